"""The start-up proof behind ``numerics: exact``: a row's bits must not depend on what stands beside it.

The same rows are run alone, at every index of small batches with other neighbours, and as tree nodes instead of a
chain; logits and hidden states must be equal to the bit.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch

if TYPE_CHECKING:
    from pdspec.engine.resources import Resources

log = logging.getLogger(__name__)
PREFIX, ROWS = 21, 9


def check_exact(resources: Resources, wanted: str) -> str:
    """The numerics mode that holds: ``wanted``, or "fast" for "auto" where the proof fails (said once).

    Raises ConfigError when "exact" was asked for and the proof fails."""
    if wanted == "fast":
        return "fast"
    difference = first_difference(resources)
    if not difference:
        return "exact"
    if wanted == "auto":
        log.warning("numerics: fast, because %s", difference)
        return "fast"
    raise ConfigError(
        f"exact does not hold here: {difference}", field="numerics", remedy="use numerics fast, or install a C compiler"
    )


def first_difference(resources: Resources) -> str:
    """What breaks row invariance, empty when nothing does. Uses a few free pages and gives them back."""
    if resources.ops.name != "native":
        return "torch picks its kernels by the shape of the batch"
    pages = resources.pool.allocate((PREFIX + ROWS) // resources.pool.page_size + 1)
    try:
        return _compare(resources, pages)
    finally:
        resources.pool.release(pages)


def _compare(resources: Resources, pages: list[int]) -> str:
    vocab = resources.files.config.vocab_size
    tokens = np.random.default_rng(7).integers(0, vocab, PREFIX + ROWS).astype(np.int32)

    def run(start: int, stop: int, order: list[int] | None = None, tree: bool = False) -> torch.Tensor:
        batch = _rows(tokens, pages, start, stop, tree)
        if order is not None:
            batch = _reordered(batch, order)
        return resources.runner.forward(batch, resources.cache).logits

    run(0, PREFIX)
    whole = run(PREFIX, PREFIX + ROWS)
    for index in range(ROWS):  # one at a time: the plain decode step
        if not torch.equal(run(PREFIX + index, PREFIX + index + 1)[0], whole[index]):
            return f"row {index} of {ROWS} differs from the same row alone"
    for count in range(2, ROWS):
        order = list(np.random.default_rng(count).permutation(count))
        got = run(PREFIX, PREFIX + count, order)
        if not torch.equal(got, whole[order]):
            return f"rows change with their order in a batch of {count}"
    if not torch.equal(run(PREFIX, PREFIX + ROWS, tree=True), whole):
        return "a tree path differs from the same chain"
    return ""


def _rows(tokens: np.ndarray, pages: list[int], start: int, stop: int, tree: bool) -> ForwardBatch:
    slots = np.arange(start, stop, dtype=np.int32)
    rows = len(slots)
    if tree:
        ancestors = np.where(np.tri(rows, dtype=bool), slots[None], -1).astype(np.int32)
        prefix = np.full(rows, start, np.int32)
    else:
        ancestors, prefix = np.empty((rows, 0), np.int32), slots + 1
    return ForwardBatch(
        token_ids=tokens[start:stop],
        positions=slots,
        sequence=np.zeros(rows, np.int32),
        slots=slots,
        prefix_len=prefix.astype(np.int32),
        ancestors=ancestors,
        page_table=np.array([pages], np.int32),
        logit_rows=np.arange(rows, dtype=np.int32),
    )


def _reordered(batch: ForwardBatch, order: list[int]) -> ForwardBatch:
    names = ("token_ids", "positions", "sequence", "slots", "prefix_len", "ancestors")
    taken: dict[str, Any] = {name: np.ascontiguousarray(getattr(batch, name)[order]) for name in names}
    return dataclasses.replace(batch, **taken)
