"""Rows of draft forwards, packed: what several sequences want computed at once, whatever the draft model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdspec.model.batch import ForwardBatch
from pdspec.spec.protocol import DraftContext

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class DraftRows:
    """Rows of one sequence: row r reads ``token_ids[r]``, writes slot ``slots[r]``, and sees the slots below
    ``prefix[r]`` and then those of ``paths[r]`` (its ancestors and itself; empty where it lies within its prefix)."""

    ctx: DraftContext
    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    prefix: Sequence[int]
    paths: Sequence[Sequence[int] | Ints]

    @classmethod
    def committed(cls, ctx: DraftContext, token_ids: Sequence[int], start: int) -> DraftRows:
        """Rows that continue the sequence at ``start``: slot and position are their index."""
        rows = range(start, start + len(token_ids))
        return cls(ctx=ctx, token_ids=token_ids, positions=rows, slots=rows,
                   prefix=range(start + 1, rows.stop + 1), paths=[()] * len(rows))


def pack_rows(rows: Sequence[DraftRows], page_size: int, logit_rows: Ints | None = None) -> ForwardBatch:
    """One forward over the rows of several sequences. Raises ValueError for a slot beyond a sequence's pages."""
    for one in rows:
        if max(one.slots) >= len(one.ctx.pages) * page_size:
            raise ValueError(f"{one.ctx.request_id}: draft row {max(one.slots)} in {len(one.ctx.pages)} pages")
    table = np.full((len(rows), max(len(one.ctx.pages) for one in rows)), -1, np.int32)
    for own, one in zip(table, rows, strict=True):
        own[: len(one.ctx.pages)] = one.ctx.pages
    paths = [path for one in rows for path in one.paths]
    ancestors = np.full((len(paths), max(map(len, paths))), -1, np.int32)
    for row, path in zip(ancestors, paths, strict=True):
        row[: len(path)] = path

    def flat(name: str) -> Ints:
        return np.array([value for one in rows for value in getattr(one, name)], np.int32)

    return ForwardBatch(
        token_ids=flat("token_ids"), positions=flat("positions"), slots=flat("slots"), prefix_len=flat("prefix"),
        sequence=np.repeat(np.arange(len(rows), dtype=np.int32), [len(one.slots) for one in rows]),
        ancestors=ancestors, page_table=table,
        logit_rows=np.empty(0, np.int32) if logit_rows is None else logit_rows,
    )
