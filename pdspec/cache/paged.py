"""The KV tensors behind the pages, one per cache group, and the byte view of them that handoffs move.

Group tensor ``[layers, num_pages, page_size, parts, kv_heads, head_dim]``; the parts are k and v, or one alone (see
``CacheGroup``). A page is in the canonical wire order ``[token][k|v][head][dim]``, so pages that follow one another in
memory move as one copy. Rows are addressed by a sequence's page list: row r lives in ``pages[r // page_size]`` at
``r % page_size``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pdspec.types import CacheGroup

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_ALIGNMENT = 64


class PagedCache:
    """Zero-filled KV of all ``groups``; page ids come from one PagePool and mean the same in every group."""

    def __init__(
        self, groups: tuple[CacheGroup, ...], num_pages: int, page_size: int, device: str | torch.device = "cpu"
    ) -> None:
        self.groups = groups
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = torch.device(device)
        self._layout = {group.name: group for group in groups}
        if len(self._layout) != len(groups):
            raise ValueError(f"cache groups need distinct names: {[group.name for group in groups]}")
        self._tensors = {group.name: self._zeros(group) for group in groups}
        # uint8 views ``[layers, num_pages * page_size, parts, kv_heads, bytes of one head]``
        self._rows = {name: tensor.view(torch.uint8).flatten(1, 2) for name, tensor in self._tensors.items()}
        self._memory = {name: rows.numpy() for name, rows in self._rows.items() if self.device.type == "cpu"}

    def group(self, name: str) -> torch.Tensor:
        """``[layers, num_pages, page_size, parts, kv_heads, head_dim]``; index it with a layer for a runner."""
        return self._tensors[name]

    def layout(self, name: str) -> CacheGroup:
        """The geometry of a group."""
        return self._layout[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all groups."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read_rows(
        self, group: str, layer: int, pages: Sequence[int], start: int, stop: int,
        head_start: int = 0, head_count: int | None = None,
    ) -> bytes:
        """Rows ``start..stop-1`` of one layer as bytes ``[token][k|v][head][dim]``. Raises IndexError for rows
        or heads that are not there."""
        return b"".join(self.row_views(group, layer, pages, start, stop, head_start, head_count))

    def row_views(
        self, group: str, layer: int, pages: Sequence[int], start: int, stop: int,
        head_start: int = 0, head_count: int | None = None,
    ) -> tuple[memoryview, ...]:
        """``read_rows`` in parts that follow one another; on the CPU, for all heads, they are the pages themselves."""
        heads = self._heads(group, head_start, head_count)
        runs = list(self._runs(pages, start, stop))
        if self.device.type == "cpu":
            memory = self._memory[group][layer]
            return tuple(np.ascontiguousarray(memory[a:b, :, heads]).data for a, b in runs if heads.stop > heads.start)
        rows = self._rows[group][layer]
        return (torch.cat([rows[a:b, :, heads] for a, b in runs]).cpu().numpy().data,) if runs else ()

    def write_rows(
        self, group: str, layer: int, pages: Sequence[int], start: int, stop: int, data: bytes | memoryview,
        head_start: int = 0, head_count: int | None = None,
    ) -> None:
        """The inverse of ``read_rows``. Raises ValueError for data of another length, before anything is written."""
        heads = self._heads(group, head_start, head_count)
        rows = self._rows[group][layer]
        shape = (stop - start, rows.shape[1], heads.stop - heads.start, rows.shape[-1])
        if memoryview(data).nbytes != int(np.prod(shape)):
            size = memoryview(data).nbytes
            raise ValueError(f"{size} bytes for rows {start}..{stop} of {group}, {int(np.prod(shape))} expected")
        source = np.frombuffer(data, np.uint8).reshape(shape)
        done = 0
        for a, b in self._runs(pages, start, stop):
            part = source[done : done + b - a]
            if self.device.type == "cpu":
                self._memory[group][layer][a:b, :, heads] = part  # lets go of the GIL
            else:
                rows[a:b, :, heads] = torch.from_numpy(part.copy()).to(self.device)
            done += b - a

    def copy_rows(
        self, group: str | None, pages: Sequence[int], src_rows: Sequence[int], dst_rows: Sequence[int]
    ) -> None:
        """Row ``src_rows[i]`` to ``dst_rows[i]`` in all layers of a group (None: of every group); all sources are
        read before anything is written, so the lists may overlap. This is how accepted tree rows become contiguous."""
        if len(src_rows) != len(dst_rows):
            raise ValueError(f"{len(src_rows)} source rows for {len(dst_rows)} destinations")
        source, target = self._flat(pages, src_rows), self._flat(pages, dst_rows)
        for name in self._names(group):
            rows = self._tensors[name].flatten(1, 2)
            rows[:, target] = rows[:, source]

    def copy_page(self, group: str, source: int, target: int) -> None:
        """All layers of a page of one group."""
        tensor = self._tensors[group]
        tensor[:, target] = tensor[:, source]

    def poison(self, group: str | None, pages: Sequence[int], start: int, stop: int) -> None:
        """NaN into rows ``start..stop-1`` of all layers of a group (None: of every group): what is read after
        this can no longer go unnoticed."""
        for name in self._names(group):
            rows = self._tensors[name].flatten(1, 2)
            for a, b in self._runs(pages, start, stop):
                rows[:, a:b] = torch.nan

    def _zeros(self, group: CacheGroup) -> torch.Tensor:
        """On the CPU the memory comes zeroed from the system and costs nothing until a row is written."""
        shape = (group.num_layers, self.num_pages, self.page_size, group.parts, group.num_kv_heads, group.head_dim)
        dtype = DTYPES[group.dtype]
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.zeros(size + _ALIGNMENT, np.uint8)
        offset = -memory.ctypes.data % _ALIGNMENT
        return torch.from_numpy(memory[offset : offset + size]).view(dtype).view(shape)

    def _runs(self, pages: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows ``start..stop-1`` as ranges of flat rows (page * page_size + offset), neighbours joined."""
        if not 0 <= start <= stop <= len(pages) * self.page_size:
            raise IndexError(f"rows {start}..{stop} in {len(pages)} pages of {self.page_size}")
        held = pages[start // self.page_size : -(-stop // self.page_size)]
        first = held[0] if held else 0
        if 0 <= first <= self.num_pages - len(held) and list(held) == list(range(first, first + len(held))):
            begin = first * self.page_size + start % self.page_size
            if stop > start:  # pages that follow one another, without a loop
                yield begin, begin + stop - start
            return
        begin = end = -1
        row = start
        while row < stop:
            page, offset = pages[row // self.page_size], row % self.page_size
            if not 0 <= page < self.num_pages:
                raise IndexError(f"page {page} of {self.num_pages}")
            count = min(stop - row, self.page_size - offset)
            first = page * self.page_size + offset
            if first != end:
                if end >= 0:
                    yield begin, end
                begin = first
            end = first + count
            row += count
        if end >= 0:
            yield begin, end

    def _flat(self, pages: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Flat row numbers ``[len(rows)]`` int64."""
        if len(rows) and not 0 <= min(rows) <= max(rows) < len(pages) * self.page_size:
            raise IndexError(f"rows {list(rows)} in {len(pages)} pages of {self.page_size}")
        flat = [pages[row // self.page_size] * self.page_size + row % self.page_size for row in rows]
        return torch.tensor(flat, dtype=torch.int64, device=self.device)

    def _heads(self, group: str, head_start: int, head_count: int | None) -> slice:
        total = self._layout[group].num_kv_heads
        stop = total if head_count is None else head_start + head_count
        if not 0 <= head_start <= stop <= total:
            raise IndexError(f"heads {head_start}..{stop} of {total} in {group}")
        return slice(head_start, stop)

    def _names(self, group: str | None) -> list[str]:
        return list(self._tensors) if group is None else [group]
