"""What ``FeatureDrafter`` works with: the model's protocol, a sequence's state, and rows packed for a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from pdspec.model.batch import ForwardBatch
from pdspec.spec.growth import Ranked
from pdspec.spec.protocol import Candidates, HiddenRows
from pdspec.spec.tree import TreeSpec

_ROW_FIELDS = ("token_ids", "positions", "sequence", "slots", "prefix_len", "ancestors")


class FeatureModel(Protocol):
    """A head's forward pass over draft KV pages (``eagle3/head.py``). ``config`` has ``hidden_size`` H; the ``group``
    holds its KV rows."""

    ops: Any
    config: Any
    max_positions: int

    def features(self, hidden: HiddenRows) -> torch.Tensor:
        """What rows read of the target: [R, H]. Raises ValueError where it was not captured."""

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """Writes the KV rows of all R rows; the layer's output [len(outputs), H] of the rows ``outputs``."""

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, draft vocabulary] float32 of outputs [R, H]."""


@dataclass(kw_only=True)
class FeatureState:
    """A sequence's part. ``feature`` [1, H] is the output of the last committed row, ``waiting`` [1 or 0, H] the
    features of the row whose token is not known yet. ``candidates`` are what crosses the handoff, ``first`` the first
    children of the next tree; both are made when first needed. ``made`` has, where KV is unstable, the slot of each
    expanded node of the last tree by the tokens that lead to it."""

    spec: TreeSpec
    rows: int  # committed draft rows
    waiting: torch.Tensor | None = None
    feature: torch.Tensor | None = None
    candidates: Candidates | None = None
    first: Ranked | None = None
    made: dict[tuple[int, ...], int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one sequence, which has ``committed`` draft rows. A committed row's path is empty, and it sees the slots
    up to its own; a tree node sees the committed rows and its path: the slots of its ancestors and its own."""

    name: str  # of the sequence, for errors
    pages: Sequence[int]
    committed: int
    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    paths: Sequence[Sequence[int]]


def pack_rows(rows: Sequence[Rows], page_size: int) -> ForwardBatch:
    """One batch of the rows of several sequences, in order. Raises ValueError for a row beyond its sequence's pages."""
    count = sum(len(one.slots) for one in rows)
    longest = max(len(path) for one in rows for path in one.paths)
    table = np.full((len(rows), max(len(one.pages) for one in rows)), -1, np.int32)
    ancestors = np.full((count, longest), -1, np.int32)
    prefix = np.empty(count, np.int32)
    row = 0
    for index, one in enumerate(rows):
        table[index, : len(one.pages)] = one.pages
        if max(one.slots) >= len(one.pages) * page_size:
            raise ValueError(f"{one.name}: draft row {max(one.slots)} in {len(one.pages)} pages")
        for slot, path in zip(one.slots, one.paths, strict=True):
            ancestors[row, : len(path)] = path
            prefix[row] = one.committed if path else slot + 1
            row += 1

    def flat(name: str) -> np.ndarray:
        return np.array([value for one in rows for value in getattr(one, name)], np.int32)

    return ForwardBatch(
        token_ids=flat("token_ids"), positions=flat("positions"), slots=flat("slots"), prefix_len=prefix,
        sequence=np.repeat(np.arange(len(rows), dtype=np.int32), [len(one.slots) for one in rows]),
        ancestors=ancestors, page_table=table, logit_rows=np.empty(0, np.int32),
    )


def take_rows(batch: ForwardBatch, rows: np.ndarray) -> ForwardBatch:
    """Some rows of a batch, in the order named."""
    taken: dict[str, Any] = {name: np.ascontiguousarray(getattr(batch, name)[rows]) for name in _ROW_FIELDS}
    return replace(batch, **taken)


def later_rows(hidden: HiddenRows, count: int) -> HiddenRows:
    """Hidden rows without the first ``count``."""
    if count == 0:
        return hidden
    captured, final = hidden.captured, hidden.final
    return HiddenRows(
        start=hidden.start + count, captured=None if captured is None else captured[count:],
        final=None if final is None else final[count:],
    )
