"""``pdspec study draft-vocab``: how large a draft vocabulary should be, by what it covers and what it costs here.

Measured in turns on this machine: one row through an EAGLE-3 head with output rows of its own for each size, and the
target's verification of a chain. A draft token outside the vocabulary cannot be right, so with acceptance ``a`` inside
it (given) and coverage ``c`` a chain of K yields 1 + Σ_{k≤K} (a c)^k tokens in the time of K draft rows and one
verification of K + 1 rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.model.loader import load_weights, resolve
from pdspec.spec.eagle3.checkpoint import random_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.eagle3.head import Eagle3Head
from pdspec.train.data import PAGE_SIZE, Target, load_target
from pdspec.train.recipe import output_rows
from pdspec.train.store import TokenStore
from pdspec.train.vocab import answer_counts, coverage, draft_vocabulary

CONTEXT = 256  # tokens before the measured rows


def run(
    *, model: str, data: Sequence[Path], sizes: Sequence[int], chain: int, acceptance: float, threads: int,
    rounds: int, cache_dir: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One row per size. Raises ConfigError for stores of another target and sizes that cannot be."""
    config = resolve(model, cache_dir).config
    if wrong := [size for size in sizes if not 1 <= size <= config.vocab_size]:
        raise ConfigError(f"{wrong[0]} of {config.vocab_size} ids", field="sizes", remedy="choose fewer")
    counts = np.zeros(config.vocab_size, np.int64)
    for folder in data:
        counts += answer_counts(TokenStore(folder).read_all(hidden_rows=False), config.vocab_size)
    shares = {size: coverage(counts, draft_vocabulary(counts, size)) for size in sizes}
    verify_ms, draft_ms = _measured(model, sizes, chain, threads, rounds, cache_dir)
    rows = []
    for size in sizes:
        expected = sum((acceptance * shares[size]) ** k for k in range(chain + 1))
        rows.append({
            "draft_vocab": size, "coverage": round(shares[size], 4), "draft_ms": round(draft_ms[size], 4),
            "tokens_per_second": round(1000 * expected / (verify_ms + chain * draft_ms[size]), 1),
        })  # fmt: skip
    best = max(rows, key=lambda row: row["tokens_per_second"])["draft_vocab"]
    return {"model": model, "answer_tokens": int(counts.sum()), "chain": chain, "acceptance": acceptance,
            "verify_ms": round(verify_ms, 4), "rows": rows, "best": best}  # fmt: skip


def _measured(
    model: str, sizes: Sequence[int], chain: int, threads: int, rounds: int, cache_dir: str | None
) -> tuple[float, dict[int, float]]:
    target = load_target(model, threads=threads, cache_dir=cache_dir)
    try:
        verify = verification(target, chain + 1)
        weights = load_weights(resolve(model, cache_dir), target.runner.dtype)
        drafts = {size: draft_row(target, weights, size) for size in sizes}
        times = in_turns([verify, *drafts.values()], rounds)
    finally:
        target.runner.ops.close()
    return times[0], dict(zip(sizes, times[1:], strict=True))


def in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each, one after the other in every round; the first round warms up."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for found, one in zip(times, runs, strict=True):
            began = time.perf_counter()
            one()
            found.append(1000 * (time.perf_counter() - began))
    return [statistics.median(found[1:]) for found in times]


def verification(target: Target, rows: int) -> Callable[[], object]:
    pages = pages_for(CONTEXT + rows, PAGE_SIZE)
    cache = PagedCache((target.runner.group,), pages, PAGE_SIZE)
    batch = _rows(rows, pages, np.arange(rows, dtype=np.int32))
    return lambda: target.runner.forward(batch, cache)


def draft_row(target: Target, weights: dict[str, torch.Tensor], size: int) -> Callable[[], object]:
    """One row through a head of random weights, and its best ids."""
    config = Eagle3Config.for_target(target.runner.config, size)
    dtype, ops, pages = target.runner.dtype, target.runner.ops, pages_for(CONTEXT + 1, PAGE_SIZE)
    head = Eagle3Head(
        random_head(config, 0), ops=ops, embedding=ops.pack(weights["model.embed_tokens.weight"]),
        cache=PagedCache((config.cache_group(dtype),), pages, PAGE_SIZE), dtype=dtype, max_positions=CONTEXT + 1,
        lm_head=ops.pack(output_rows(weights)),
    )  # fmt: skip
    batch, features = _rows(1, pages, np.empty(0, np.int32)), torch.zeros(1, config.hidden_size)

    def once() -> object:
        with torch.inference_mode():
            return head.logits(head.forward(batch, features, np.zeros(1, np.int32))).log_softmax(-1).topk(4)

    return once


def _rows(rows: int, pages: int, logit_rows: np.ndarray) -> ForwardBatch:
    """Rows behind CONTEXT tokens of one sequence."""
    slots = np.arange(CONTEXT, CONTEXT + rows, dtype=np.int32)
    return ForwardBatch(
        token_ids=np.zeros(rows, np.int32), positions=slots, sequence=np.zeros(rows, np.int32), slots=slots,
        prefix_len=slots + 1, ancestors=np.empty((rows, 0), np.int32), logit_rows=logit_rows,
        page_table=np.arange(pages, dtype=np.int32)[None],
    )  # fmt: skip
