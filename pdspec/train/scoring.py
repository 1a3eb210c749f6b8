"""What the losses of all draft families share: the rows they score, and the target's side of it.

Loss of a row: how far q is from the target's distribution over the draft vocabulary (``divergence.py``); rows whose
best target token lies outside that vocabulary are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pdspec.train.divergence import divergence
from pdspec.train.packing import Packed
from pdspec.train.precision import product


@dataclass(frozen=True)
class TargetParts:
    """What the head borrows of its target, float32: input embedding [V, H] and the output rows of the draft
    vocabulary [draft vocabulary, H]."""

    embedding: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class StepScores:
    """Of one training-time-test step: its rows as (example, row) int64 [M, 2], loss, and what was asked for."""

    rows: torch.Tensor
    loss: torch.Tensor  # mean over unmasked rows
    hits: torch.Tensor  # [M] bool: the best draft token is the best target token
    counted: torch.Tensor  # [M] bool: rows in the loss
    ranked: torch.Tensor | None  # [M, k] draft ids, best first


def teacher(packed: Packed, parts: TargetParts) -> torch.Tensor:
    """Target probabilities over the draft vocabulary of every target row that some step predicts from."""
    return product(packed.final, parts.output).softmax(-1)


def draft_ids_of(target_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """int64 [vocabulary]: the draft id of each target id, -1 where it has none."""
    draft_ids = torch.full((vocab_size,), -1, dtype=torch.int64)
    draft_ids[target_ids] = torch.arange(len(target_ids))
    return draft_ids


def score(
    y: torch.Tensor, output: torch.Tensor, packed: Packed, rows: torch.Tensor, step: int, *,
    teacher_p: torch.Tensor, draft_ids: torch.Tensor, rank: int, objective: str,
    first: int = 0,
) -> StepScores:  # fmt: skip
    """``y`` [M, H] of flat ``rows`` [M] through ``output`` [draft vocabulary, H] against what the target says ``step``
    tokens beyond each row's next but one. ``rank``: how many best draft ids to return per row; ``objective``: see
    ``divergence.py``; ``first``: the target row with which ``teacher_p`` begins."""
    where = packed.final_row[rows] + step  # the target row whose distribution is predicted
    best = draft_ids[packed.best[where].clamp(min=0)]
    counted = (packed.best[where] >= 0) & (best >= 0)
    weight = counted.float() / counted.sum().clamp(min=1)
    loss, ranked = divergence(objective, y, output, teacher_p, where - first, weight, max(rank, 1))
    example = torch.bucketize(rows, torch.tensor(packed.bounds[1:]), right=True)
    return StepScores(
        torch.stack((example, rows - torch.tensor(packed.bounds)[example]), 1), loss, ranked[:, 0] == best, counted,
        ranked if rank else None,
    )


def weighted(losses: Sequence[torch.Tensor], decay: float) -> torch.Tensor:
    """Σ_j decay^j loss_j / Σ_j decay^j."""
    weights = [decay**j for j in range(len(losses))]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of the last dimension (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, half-split form."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
