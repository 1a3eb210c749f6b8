"""Ways in which a handoff's draft state can be wrong, each put onto a running prefill worker from outside.

What is broken is the real path: the worker's own drafter, model or page cache stands behind a wrapper, the frames are
whole and their checksums right, and nothing downstream can tell. The decode worker is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pdspec.engine.resources import Resources
from pdspec.model.batch import ForwardBatch
from pdspec.spec.protocol import Candidates, DraftContext, HiddenRows
from pdspec.study.pair import Pair

DRAFTER = "eagle3"


class _Behind:
    """Everything as the real one has it, but for what a subclass says."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class TokenShift(_Behind):
    """Draft row i reads t_{i+1+by}; at the ends, where there is none, the nearest that there is."""

    def __init__(self, real: Any, by: int) -> None:
        super().__init__(real)
        self._by = by

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """As the real one, of other tokens."""
        wrong = replace(ctx, token_ids=[ctx.token_ids[i] for i in _shifted(len(ctx.token_ids), self._by)])
        self._real.prefill(wrong, hidden)
        ctx.state = wrong.state


class HiddenShift(_Behind):
    """Draft row i reads h_{i+by}; at the ends, where there is none, the nearest that there is. Prompts must come in
    one chunk."""

    def __init__(self, real: Any, by: int) -> None:
        super().__init__(real)
        self._by = by

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """As the real one, of other hidden states."""
        if hidden.start or hidden.num_rows != ctx.prompt_len:
            raise ValueError("hidden rows can be shifted within one chunk only")
        rows = _shifted(hidden.num_rows, self._by)
        captured = None if hidden.captured is None else hidden.captured[rows]
        final = None if hidden.final is None else hidden.final[rows]
        self._real.prefill(ctx, replace(hidden, captured=captured, final=final))


class PositionShift(_Behind):
    """A head whose row i stands at RoPE position i+by (0 where that is negative)."""

    def __init__(self, real: Any, by: int) -> None:
        super().__init__(real)
        self._by = by

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """As the real one, elsewhere."""
        positions = np.maximum(batch.positions + np.int32(self._by), 0)
        output: torch.Tensor = self._real.forward(replace(batch, positions=positions), features, outputs)
        return output


class WrongLayers(_Behind):
    """A drafter that reads the layers beside those it was trained on: outputs for inputs, where there are such."""

    def __init__(self, real: Any, num_layers: int) -> None:
        super().__init__(real)
        by = 1 if max(real.capture) + 1 < num_layers else -1
        self.capture = tuple(layer + by for layer in real.capture)


class OtherStart(_Behind):
    """A drafter whose ``start`` is the one of the request before (the first gets its own)."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        self._before: tuple[Candidates | None, dict[str, torch.Tensor]] | None = None

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """Another request's first tokens and feature."""
        own = self._real.start(ctx)
        before, self._before = self._before, own
        return before or own


class EmptyDraftRows(_Behind):
    """A page cache that reads zeros wherever draft KV is asked for."""

    def row_views(self, group: str, layer: int, pages: Sequence[int], start: int, stop: int) -> tuple[memoryview, ...]:
        """As many bytes as there should be."""
        parts: tuple[memoryview, ...] = self._real.row_views(group, layer, pages, start, stop)
        return tuple(memoryview(bytes(part.nbytes)) for part in parts) if group.startswith("draft/") else parts


def _shifted(count: int, by: int) -> list[int]:
    return [min(max(i + by, 0), count - 1) for i in range(count)]


def _drafter(wrap: Callable[[Any], Any], resources: Resources, name: str) -> Callable[[], None]:
    real = resources.drafters[name]
    resources.drafters[name] = wrap(real)
    return partial(resources.drafters.__setitem__, name, real)


def _layers(resources: Resources, name: str) -> Callable[[], None]:
    return _drafter(lambda real: WrongLayers(real, resources.files.config.num_layers), resources, name)


def _attribute(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    real = getattr(owner, name)
    setattr(owner, name, wrap(real))
    return partial(setattr, owner, name, real)


def _positions(by: int, resources: Resources, name: str) -> Callable[[], None]:
    drafter: Any = resources.drafters[name]
    if name == "mtp":  # modules in series run one by one
        return _attribute(drafter, "_modules", lambda modules: [PositionShift(module, by) for module in modules])
    return _attribute(drafter, "model", lambda real: PositionShift(real, by))


def _empty(resources: Resources, name: str) -> Callable[[], None]:
    return _attribute(resources, "cache", EmptyDraftRows)


# name → how it is put onto a worker's resources, for the drafter named; what that returns takes it off again
BREAKAGES: dict[str, Callable[[Resources, str], Callable[[], None]]] = {
    "token shift +1": partial(_drafter, lambda real: TokenShift(real, 1)),
    "token shift -1": partial(_drafter, lambda real: TokenShift(real, -1)),
    "hidden shift +1": partial(_drafter, lambda real: HiddenShift(real, 1)),
    "hidden shift -1": partial(_drafter, lambda real: HiddenShift(real, -1)),
    "position +1": partial(_positions, 1),
    "position -1": partial(_positions, -1),
    "wrong fused layer": _layers,
    "empty draft KV": _empty,
    "another request's DraftStart": partial(_drafter, OtherStart),
}
_ONE_LEVEL = tuple(name for name in BREAKAGES if name != "wrong fused layer")
# Those that a family's control is sure to see. Medusa reads one hidden row, the last: no token, position or later row.
APPLY = {
    "eagle1": _ONE_LEVEL, "eagle2": _ONE_LEVEL, "eagle3": tuple(BREAKAGES), "mtp": _ONE_LEVEL,
    "medusa": ("hidden shift -1", "another request's DraftStart"),
}  # fmt: skip


@contextmanager
def broken(pair: Pair, name: str, drafter: str = DRAFTER) -> Iterator[None]:
    """The prefill worker of ``pair`` with one breakage of ``BREAKAGES`` of ``drafter``, for as long as the block."""
    resources = pair.prefill.engine.host.resources
    undo = pair.on_engine(pair.prefill, lambda: BREAKAGES[name](resources, drafter))
    try:
        yield
    finally:
        pair.on_engine(pair.prefill, undo)
