"""What the first rank tells the others, as tensors of known size: a header of int64, then what the header announces.

    BATCH    rows and inputs of a forward        then index arrays (int32) and x [R, H] (float32), as bytes
    LAYERS   run layers first .. last-1 of it
    READ … POISON   one operation on the rank's pages; page ids and rows stand in the header where there is room
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from pdspec.model.batch import ForwardBatch
from pdspec.parallel.group import Group

ARRAYS = ("token_ids", "positions", "sequence", "slots", "prefix_len", "ancestors", "page_table")
INLINE = 120  # numbers in a page operation's header
_HEAD = 6  # of them: op, layer, start, stop, head_start, head_count


class Kind(IntEnum):
    """The first number of every message."""

    BATCH = 1
    LAYERS = 2
    READ = 3
    WRITE = 4
    COPY_ROWS = 5
    COPY_PAGE = 6
    POISON = 7


def tell_batch(group: Group, batch: ForwardBatch, x: torch.Tensor) -> None:
    """A forward's inputs, to all."""
    rows, width = x.shape
    header = [Kind.BATCH, rows, width, batch.ancestors.shape[1], *batch.page_table.shape]
    group.broadcast(torch.tensor(header, dtype=torch.int64))
    arrays = [torch.from_numpy(np.ascontiguousarray(getattr(batch, name)).reshape(-1)) for name in ARRAYS]
    group.broadcast(torch.cat([part.contiguous().view(torch.uint8) for part in (*arrays, x.cpu().reshape(-1))]))


def tell_layers(group: Group, first: int, last: int) -> None:
    """Run them over the batch told last."""
    group.broadcast(torch.tensor([Kind.LAYERS, first, last, 0, 0, 0], dtype=torch.int64))


def hear(group: Group) -> list[int]:
    """The next header of ``tell_batch`` or ``tell_layers``."""
    return group.broadcast(torch.empty(6, dtype=torch.int64)).tolist()  # type: ignore[no-any-return]


def hear_batch(group: Group, header: Sequence[int]) -> tuple[ForwardBatch, torch.Tensor]:
    """The rest of ``tell_batch``: the batch, and x [R, H] on the CPU."""
    _, rows, width, ancestors, sequences, pages = header
    shapes = [*(5 * [(rows,)]), (rows, ancestors), (sequences, pages)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    data = group.broadcast(torch.empty(4 * (sum(sizes) + rows * width), dtype=torch.uint8))
    numbers, ends = data.numpy().view(np.int32), np.cumsum(sizes)
    arrays: dict[str, Any] = {
        name: numbers[end - size : end].reshape(shape)
        for name, size, end, shape in zip(ARRAYS, sizes, ends, shapes, strict=True)
    }
    x = torch.from_numpy(numbers[ends[-1] :].view(np.float32).reshape(rows, width))
    return ForwardBatch(**arrays, logit_rows=np.empty(0, np.int32)), x


@dataclass(frozen=True, kw_only=True)
class PageCall:
    """One operation on a rank's pages. ``numbers`` are page ids, or for COPY_ROWS their count, they, sources and
    targets; heads are the rank's own, from 0."""

    kind: Kind
    numbers: list[int] = field(default_factory=list)
    layer: int = 0
    start: int = 0
    stop: int = 0
    head_start: int = 0
    head_count: int = 0

    def tell(self, group: Group, rank: int) -> None:
        """To ``rank``."""
        head = [self.kind, self.layer, self.start, self.stop, self.head_start, self.head_count, len(self.numbers)]
        inline = self.numbers if len(self.numbers) <= INLINE else []
        header = torch.zeros(_HEAD + 1 + INLINE, dtype=torch.int64)
        header[: len(head) + len(inline)] = torch.tensor([*head, *inline])
        group.send(header, rank)
        if len(self.numbers) > INLINE:
            group.send(torch.tensor(self.numbers, dtype=torch.int64), rank)

    @classmethod
    def hear(cls, group: Group) -> PageCall:
        """The next one, from rank 0."""
        values: list[int] = group.receive(torch.empty(_HEAD + 1 + INLINE, dtype=torch.int64), 0).tolist()
        kind, layer, start, stop, head_start, head_count, count = values[: _HEAD + 1]
        numbers = values[_HEAD + 1 : _HEAD + 1 + count]
        if count > INLINE:
            numbers = group.receive(torch.empty(count, dtype=torch.int64), 0).tolist()
        return cls(
            kind=Kind(kind), numbers=numbers, layer=layer, start=start, stop=stop, head_start=head_start,
            head_count=head_count,
        )  # fmt: skip
