"""Teacher-forced audits (DESIGN 5): is a served answer one that the plain target, up to rounding, would have chosen?

The served tokens are fed through another path; at every position the served token's score (log p + noise) must be
within ``tau`` of the best. A position where another token is best is a *tie*; one beyond ``tau`` is *unaudited*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pdspec.engine.prefill import page_table
from pdspec.engine.resources import Resources
from pdspec.model.batch import ForwardBatch
from pdspec.noise import gumbel, gumbel_all
from pdspec.sampling import History, support
from pdspec.types import GenerateRequest

CAPS = {"float32": 1e-3, "bfloat16": 0.25}


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Counts over positions, and the largest distance from the best score that was seen."""

    positions: int = 0
    ties: int = 0
    unaudited: int = 0
    largest: float = 0.0

    def __add__(self, other: Audit) -> Audit:
        return Audit(
            positions=self.positions + other.positions, ties=self.ties + other.ties,
            unaudited=self.unaudited + other.unaudited, largest=max(self.largest, other.largest),
        )  # fmt: skip


def judge(
    logits_TV: torch.Tensor, request: GenerateRequest, output: Sequence[int], end_ids: Sequence[int], tau: float
) -> Audit:
    """``logits_TV`` [T, V]: row i is what another path says before ``output[i]``. Excluded tokens are unaudited."""
    params, history, found = request.sampling, History.of(request.prompt_ids), Audit()
    for index, token in enumerate(output):
        allowed = support(logits_TV[index], params, history, end_ids=end_ids)
        scores, ids = allowed.scores, allowed.token_ids
        if params.temperature > 0:
            where = (params.seed or 0, request.sample, len(request.prompt_ids) + index)
            scores = scores + (gumbel_all(*where, len(scores)) if ids is None else gumbel(*where, ids))
        place = token if ids is None else int(np.searchsorted(ids, token))
        inside = ids is None or (place < len(ids) and ids[place] == token)
        gap = float(scores.max() - scores[place]) if inside else float("inf")
        finite = gap if gap < float("inf") else 0.0
        found += Audit(positions=1, ties=int(gap > 0), unaudited=int(gap > tau), largest=finite)
        history = history.extended((token,))
    return found


def forced_logits(resources: Resources, tokens: Sequence[int], first: int, *, rows: int) -> torch.Tensor:
    """Plain target logits [len(tokens) - first, V] of rows ``first ..``, fed ``rows`` at a time."""
    pool = resources.pool
    pages = pool.allocate(-(-len(tokens) // pool.page_size))
    parts = []
    try:
        start = 0
        while start < len(tokens):
            stop = min(len(tokens), start + (rows if start >= first else first - start))
            slots = np.arange(start, stop, dtype=np.int32)
            wanted = np.flatnonzero(slots >= first).astype(np.int32)
            batch = ForwardBatch(
                token_ids=np.array(tokens[start:stop], np.int32), positions=slots, slots=slots,
                sequence=np.zeros(len(slots), np.int32), prefix_len=slots + 1,
                ancestors=np.empty((len(slots), 0), np.int32), page_table=page_table([pages]), logit_rows=wanted,
            )  # fmt: skip
            parts.append(resources.runner.forward(batch, resources.cache).logits.clone())
            start = stop
    finally:
        pool.release(pages)
    return torch.cat(parts)


def tolerance(resources: Resources, prompt: Sequence[int], output: Sequence[int]) -> float:
    """8 × the largest change of a log probability between one row at a time and many, capped by dtype."""
    tokens = [*prompt, *output[:-1]]
    first = len(prompt) - 1
    alone = forced_logits(resources, tokens, first, rows=1).log_softmax(-1)
    together = forced_logits(resources, tokens, first, rows=len(tokens)).log_softmax(-1)
    return min(8 * float((alone - together).abs().max()), CAPS[resources.config.dtype])


def transformers_logits(model: Any, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """What a transformers model says before each output token, [len(output), V] float32."""
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *output[:-1]]])
        return model(ids, logits_to_keep=len(output)).logits[0].float()
