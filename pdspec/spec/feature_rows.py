"""What ``FeatureDrafter`` works with: the model's protocol, and a sequence's state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from pdspec.model.batch import ForwardBatch
from pdspec.spec.growth import Ranked
from pdspec.spec.protocol import Candidates, HiddenRows
from pdspec.spec.survival import Forecast
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
    expanded node of the last tree by the tokens that lead to it. Rows of modules in series before ``origin`` were in
    the pages when the prefill began."""

    spec: TreeSpec
    rows: int  # committed draft rows
    origin: int = 0
    waiting: torch.Tensor | None = None
    feature: torch.Tensor | None = None
    candidates: Candidates | None = None
    first: Ranked | None = None
    made: dict[tuple[int, ...], int] = field(default_factory=dict)
    forecast: Forecast | None = None


def take_rows(batch: ForwardBatch, rows: np.ndarray) -> ForwardBatch:
    """Some rows of a batch, in the order named."""
    taken: dict[str, Any] = {name: np.ascontiguousarray(getattr(batch, name)[rows]) for name in _ROW_FIELDS}
    return replace(batch, **taken)


def output_rows(ops: Any, lm_head: Any, target_ids: torch.Tensor, dtype: torch.dtype) -> Any:
    """The target's output rows of the draft ids, packed by ``ops``: ``lm_head`` [V, H] itself where these are all ids,
    else a copy of its rows. Raises ValueError without ``lm_head``."""
    if lm_head is None:
        raise ValueError("this head has no output rows of its own, and no target's were given")
    ids = target_ids.numpy()
    vocabulary = lm_head.rows if hasattr(lm_head, "rows") else len(lm_head)
    whole = len(ids) == vocabulary and bool((ids == np.arange(len(ids))).all())
    return lm_head if whole else ops.pack(ops.embed(lm_head, ids).to(dtype))
