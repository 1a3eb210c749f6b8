"""The first rank's view of KV pages whose heads lie on several ranks: whole rows in, whole rows out.

The wire carries every head of a row in order, so two workers of different degrees hand over to each other as any two
do: the sender gathers its ranks' heads, the receiver scatters them to its own. Only the target's group is shared out;
draft groups lie whole on the first rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import PeerLost
from pdspec.model.split import Part
from pdspec.parallel.group import Group, RankLost
from pdspec.parallel.messages import Kind, PageCall
from pdspec.types import CacheGroup


class ShardedCache(PagedCache):
    """A ``PagedCache`` that says of ``sharded`` what it is as a whole, and holds the first part's heads of it. Methods
    may be called from any thread; they raise PeerLost when a rank is gone."""

    def __init__(
        self, groups: tuple[CacheGroup, ...], num_pages: int, page_size: int, device: str | torch.device = "cpu", *,
        sharded: str, parts: Sequence[Part], ranks: Group,
    ) -> None:  # fmt: skip
        own = [replace(g, num_kv_heads=parts[0].num_kv_heads) if g.name == sharded else g for g in groups]
        super().__init__(tuple(own), num_pages, page_size, device)
        self.groups = groups
        self._whole = {group.name: group for group in groups}
        self._sharded, self._parts, self._ranks = sharded, parts, ranks
        self._speaking = threading.Lock()

    def layout(self, name: str) -> CacheGroup:
        """The geometry of a group, with the heads of all ranks."""
        return self._whole[name]

    def row_views(
        self, group: str, layer: int, pages: Sequence[int], start: int, stop: int,
        head_start: int = 0, head_count: int | None = None,
    ) -> tuple[memoryview, ...]:
        if group != self._sharded:
            return super().row_views(group, layer, pages, start, stop, head_start, head_count)
        shape, pieces = self._shape(start, stop), []
        if start == stop:
            return ()
        for part, first, count in self._pieces(head_start, head_count):
            if part.rank == 0:
                piece = b"".join(super().row_views(group, layer, pages, start, stop, first, count))
            else:
                call = self._call(Kind.READ, layer, pages, start, stop, first, count)
                piece = self._ask(part.rank, call, answer=int(np.prod((*shape[:2], count, shape[3]))))
            pieces.append(np.frombuffer(piece, np.uint8).reshape(*shape[:2], count, shape[3]))
        return (np.concatenate(pieces, axis=2).data,) if pieces else ()

    def write_rows(
        self, group: str, layer: int, pages: Sequence[int], start: int, stop: int, data: bytes | memoryview,
        head_start: int = 0, head_count: int | None = None,
    ) -> None:
        if group != self._sharded:
            super().write_rows(group, layer, pages, start, stop, data, head_start, head_count)
            return
        pieces, shape = list(self._pieces(head_start, head_count)), self._shape(start, stop)
        heads, size = sum(count for _, _, count in pieces), memoryview(data).nbytes
        if size != int(np.prod((*shape[:2], heads, shape[3]))):
            raise ValueError(f"{size} bytes for rows {start}..{stop} of {heads} heads of {group}")
        source, done = np.frombuffer(data, np.uint8).reshape(*shape[:2], heads, shape[3]), 0
        for part, first, count in pieces:
            piece = source[:, :, done : done + count].copy()
            if part.rank == 0:
                super().write_rows(group, layer, pages, start, stop, piece.data, first, count)
            elif piece.size:
                self._ask(part.rank, self._call(Kind.WRITE, layer, pages, start, stop, first, count), piece)
            done += count

    def copy_rows(
        self, group: str | None, pages: Sequence[int], src_rows: Sequence[int], dst_rows: Sequence[int]
    ) -> None:
        super().copy_rows(group, pages, src_rows, dst_rows)
        numbers = [len(pages), *pages, *src_rows, *dst_rows]
        self._ask_all(group, lambda: PageCall(kind=Kind.COPY_ROWS, numbers=numbers))

    def copy_page(self, group: str, source: int, target: int) -> None:
        super().copy_page(group, source, target)
        self._ask_all(group, lambda: PageCall(kind=Kind.COPY_PAGE, numbers=[source, target]))

    def poison(self, group: str | None, pages: Sequence[int], start: int, stop: int) -> None:
        super().poison(group, pages, start, stop)
        self._ask_all(group, lambda: self._call(Kind.POISON, 0, pages, start, stop))

    def _shape(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """Rows, parts, all heads, and bytes of one head."""
        whole = self._whole[self._sharded]
        return stop - start, whole.parts, whole.num_kv_heads, whole.row_bytes // whole.parts // whole.num_kv_heads

    def _pieces(self, head_start: int, head_count: int | None) -> Iterator[tuple[Part, int, int]]:
        """The ranks that hold these heads: part, first head counted from the part's own, and how many. Raises
        IndexError for heads that are not there."""
        total = self._whole[self._sharded].num_kv_heads
        stop = total if head_count is None else head_start + head_count
        if not 0 <= head_start <= stop <= total:
            raise IndexError(f"heads {head_start}..{stop} of {total} in {self._sharded}")
        for part in self._parts:
            first, last = max(head_start, part.kv_heads[0]), min(stop, part.kv_heads[1])
            if first < last:
                yield part, first - part.kv_heads[0], last - first

    def _call(
        self, kind: Kind, layer: int, pages: Sequence[int], start: int, stop: int, head: int = 0, count: int = 0
    ) -> PageCall:
        """With the pages that the rows lie in alone. Raises IndexError for rows that are not there."""
        if not 0 <= start <= stop <= len(pages) * self.page_size:
            raise IndexError(f"rows {start}..{stop} in {len(pages)} pages of {self.page_size}")
        first = start // self.page_size
        held, before = list(pages[first : -(-stop // self.page_size)]), first * self.page_size
        return PageCall(
            kind=kind, numbers=held, layer=layer, start=start - before, stop=stop - before, head_start=head,
            head_count=count,
        )  # fmt: skip

    def _ask_all(self, group: str | None, call: Callable[[], PageCall]) -> None:
        if group in (None, self._sharded):
            for part in self._parts[1:]:
                self._ask(part.rank, call())

    def _ask(self, rank: int, call: PageCall, data: np.ndarray | None = None, answer: int = 1) -> bytes:
        """What ``rank`` answers, ``answer`` bytes, when it is done."""
        with self._speaking:
            try:
                call.tell(self._ranks, rank)
                if data is not None:
                    self._ranks.send(torch.from_numpy(data.reshape(-1)), rank)
                return self._ranks.receive(torch.empty(answer, dtype=torch.uint8), rank).numpy().tobytes()
            except RankLost as error:
                raise PeerLost(f"rank {rank} of this worker is gone: {error}", remedy="try another worker") from error
