"""What a step costs on this worker: the target's forward by rows and KV tokens, a family's drafts by depth and batch.

The target is measured once, when the worker starts: its time is a staircase over the rows. Drafts are learned from the
first proposal on, and both are corrected by every step that follows. Tables are values: a policy that is given the same
ones chooses the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pdspec.cache.pool import pages_for
from pdspec.engine.prefill import page_table
from pdspec.engine.resources import Resources
from pdspec.model.batch import ForwardBatch

Doubles = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

GRID = (*range(1, 17), *range(18, 33, 2), 40, 48, 64, 96, 128, 192, 256)
_PREFIX, _LONG_PREFIX = 32, 1024
_REPEATS = 3
_PROMPTS, _PROMPT_REPEATS = (8, 256), 2
_PACE, _LOCAL_PACE, _FURTHEST = 0.05, 0.02, 2.0  # a step corrects all times by so much, its own rows' by so much more
_DRAFT_MEMORY, _DRAFT_PRECISION = 0.98, 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class VerifyTimes:
    """Seconds of a target forward over ``rows`` [K] rows, ascending, and ``kv_seconds`` more for each KV token read.
    ``pace`` is how much slower than that the worker is now."""

    rows: Counts
    seconds: Doubles
    kv_seconds: float = 0.0
    pace: float = 1.0

    def at(self, rows: Any, kv_tokens: int) -> Doubles:
        """Seconds for each number of rows (a staircase: as the next larger one that was measured; beyond the last, in
        proportion)."""
        asked = np.asarray(rows)
        index = np.minimum(np.searchsorted(self.rows, asked), len(self.rows) - 1)
        beyond = np.maximum(1.0, asked / self.rows[-1])
        return self.pace * (self.seconds[index] * beyond + self.kv_seconds * kv_tokens)

    def corrected(self, rows: int, kv_tokens: int, seconds: float) -> VerifyTimes:
        """After a step that took ``seconds``; one that was held up counts as twice too slow at most."""
        ratio = float(np.clip(seconds / self.at(rows, kv_tokens), 1 / _FURTHEST, _FURTHEST))
        index = min(int(np.searchsorted(self.rows, rows)), len(self.rows) - 1)
        own = self.seconds.copy()
        own[index] *= ratio**_LOCAL_PACE
        return VerifyTimes(rows=self.rows, seconds=own, kv_seconds=self.kv_seconds, pace=self.pace * ratio**_PACE)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {"rows": self.rows.tolist(), "seconds": self.seconds.tolist(), "kv_seconds": self.kv_seconds}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> VerifyTimes:
        """What ``to_json`` gave."""
        return cls(rows=np.array(values["rows"], np.int64), seconds=np.array(values["seconds"], np.float64),
                   kv_seconds=float(values["kv_seconds"]))


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftTimes:
    """Seconds of one family's drafts: a linear regression on (1, depth, sequences, depth · sequences), the newest
    proposals counting most. No weight is negative: deeper or for more sequences is never cheaper."""

    products: Doubles  # [4, 4], of the features
    answers: Doubles  # [4], of features and seconds

    @classmethod
    def none(cls) -> DraftTimes:
        """Before any proposal: it costs nothing."""
        return cls(products=np.zeros((4, 4)), answers=np.zeros(4))

    def at(self, depths: Sequence[int] | Counts, sequences: int) -> Doubles:
        """Seconds [len(depths)] of drafts as deep, for ``sequences`` together."""
        return _draft_features(np.asarray(depths, np.float64), sequences) @ self._weights

    @cached_property
    def _weights(self) -> Doubles:
        """[4]. Features whose weight would be negative are left out, the most negative first."""
        weights, kept = np.zeros(4), np.arange(4)
        while len(kept):
            products = self.products[np.ix_(kept, kept)] + _DRAFT_PRECISION * np.eye(len(kept))
            found = np.linalg.solve(products, self.answers[kept])
            if found.min() >= 0.0:
                weights[kept] = found
                break
            kept = np.delete(kept, found.argmin())
        return weights

    def corrected(self, depth: int, sequences: int, seconds: float) -> DraftTimes:
        """After a proposal."""
        x = _draft_features(np.array([depth], np.float64), sequences)[0]
        return DraftTimes(products=_DRAFT_MEMORY * self.products + np.outer(x, x),
                          answers=_DRAFT_MEMORY * self.answers + x * seconds)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {"products": self.products.tolist(), "answers": self.answers.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DraftTimes:
        """What ``to_json`` gave."""
        return cls(products=np.array(values["products"], np.float64), answers=np.array(values["answers"], np.float64))


def _draft_features(depths: Doubles, sequences: int) -> Doubles:
    return np.stack([np.ones_like(depths), depths, np.full_like(depths, sequences), depths * sequences], -1)


def measure(resources: Resources) -> VerifyTimes:
    """The target's times on this worker, over a few pages that are free and are given back: the fastest of some runs
    each. Fewer rows than in ``GRID`` where context or pages do not allow them."""
    room = min(resources.pool.free * resources.pool.page_size, resources.runner.config.max_context) - 1
    if room < 2:
        raise ValueError(f"no room to measure steps: {resources.pool.free} free pages")
    long_prefix = min(_LONG_PREFIX, room // 2)
    most = max(1, min(GRID[-1], room - long_prefix))
    pages = resources.pool.allocate(pages_for(long_prefix + most, resources.pool.page_size))
    try:
        counts = [count for count in GRID if count <= most]
        prefix = min(_PREFIX, long_prefix)
        seconds = np.array([_fastest(resources, pages, count, prefix) for count in counts])
        few = counts[min(len(counts) - 1, 3)]
        longer = _fastest(resources, pages, few, long_prefix) - seconds[counts.index(few)]
        kv_seconds = max(0.0, longer / max(1, long_prefix - prefix))
        staircase = np.maximum.accumulate(seconds - kv_seconds * prefix)
        return VerifyTimes(rows=np.array(counts), seconds=np.maximum(staircase, 1e-7), kv_seconds=kv_seconds)
    finally:
        resources.pool.release(pages)


def _fastest(resources: Resources, pages: list[int], count: int, prefix: int) -> float:
    """Of ``count`` rows that are all children of one root."""
    slots = np.arange(prefix, prefix + count, dtype=np.int32)
    batch = ForwardBatch(
        token_ids=np.zeros(count, np.int32), positions=np.full(count, prefix, np.int32),
        sequence=np.zeros(count, np.int32), slots=slots, prefix_len=np.full(count, prefix, np.int32),
        ancestors=np.ascontiguousarray(slots[:, None]), page_table=page_table([pages]),
        logit_rows=np.arange(count, dtype=np.int32),
    )
    return _best_of(_REPEATS, resources, batch, warm=1)


def measure_prompts(resources: Resources) -> list[tuple[int, float]]:
    """(tokens, seconds) of a short and a longer prompt, the fastest of some runs each: what a worker says of itself
    before its first real ones. Uses a few free pages and gives them back; shorter ones where there are not enough."""
    room = min(resources.pool.free * resources.pool.page_size, resources.runner.config.max_context)
    found: list[tuple[int, float]] = []
    for rows in (min(rows, resources.config.chunk, room) for rows in _PROMPTS):
        if rows < 1:
            continue
        pages = resources.pool.allocate(pages_for(rows, resources.pool.page_size))
        slots = np.arange(rows, dtype=np.int32)
        batch = ForwardBatch(
            token_ids=np.zeros(rows, np.int32), positions=slots, sequence=np.zeros(rows, np.int32), slots=slots,
            prefix_len=slots + 1, ancestors=np.empty((rows, 0), np.int32), page_table=page_table([pages]),
            logit_rows=slots[-1:],
        )
        try:
            found.append((rows, _best_of(_PROMPT_REPEATS, resources, batch)))
        finally:
            resources.pool.release(pages)
    return found


def _best_of(repeats: int, resources: Resources, batch: ForwardBatch, *, warm: int = 0) -> float:
    """Seconds of the fastest forward, after ``warm`` that do not count."""
    times = []
    for _ in range(warm + repeats):
        began = time.perf_counter()
        float(resources.runner.forward(batch, resources.cache).logits[0, 0])  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times[warm:])
