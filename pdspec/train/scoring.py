"""What the losses of all draft families share: the rows they score, the target's side of it, and the cross-entropy.

Loss of a row: cross-entropy of q against the target's distribution over the draft vocabulary; rows whose best target
token lies outside that vocabulary are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.train.packing import Packed
from pdspec.train.precision import current, multiply, product

CHUNK = 512  # rows of logits in the cache at a time


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
    teacher_p: torch.Tensor, draft_ids: torch.Tensor, rank: int,
) -> StepScores:  # fmt: skip
    """``y`` [M, H] of flat ``rows`` [M] through ``output`` [draft vocabulary, H] against what the target says ``step``
    tokens beyond each row's next but one. ``rank``: how many best draft ids to return per row."""
    where = packed.final_row[rows] + step  # the target row whose distribution is predicted
    best = draft_ids[packed.best[where].clamp(min=0)]
    counted = (packed.best[where] >= 0) & (best >= 0)
    weight = counted.float() / counted.sum().clamp(min=1)
    loss, ranked = SoftCrossEntropy.apply(y, output, teacher_p, where, weight, max(rank, 1), current())
    example = torch.bucketize(rows, torch.tensor(packed.bounds[1:]), right=True)
    return StepScores(
        torch.stack((example, rows - torch.tensor(packed.bounds)[example]), 1), loss, ranked[:, 0] == best, counted,
        ranked if rank else None,
    )


def weighted(scores: Sequence[StepScores], decay: float) -> torch.Tensor:
    """Σ_j decay^j loss_j / Σ_j decay^j."""
    weights = [decay**j for j in range(len(scores))]
    return torch.stack([w * s.loss for w, s in zip(weights, scores, strict=True)]).sum() / sum(weights)


class SoftCrossEntropy(torch.autograd.Function):
    """Σ_m weight_m · H(p_m, softmax(y_m Wᵀ)) and the best ids; logits are made, used and dropped chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        weight_VH: torch.Tensor,
        teacher: torch.Tensor,
        where: torch.Tensor,
        row_weight: torch.Tensor,
        rank: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """y [M, H], teacher [T, V], where [M] rows of teacher, row_weight [M] → loss [], ids [M, rank].
        Products in ``dtype``."""
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_y, grad_w = (torch.empty_like(y), torch.zeros_like(weight_VH)) if wanted else (None, None)
        low_y, low_w = y.to(dtype), weight_VH.to(dtype)
        loss, ranked = y.new_zeros(()), torch.empty(len(y), rank, dtype=torch.int64)
        for a in range(0, len(y), CHUNK):
            part = slice(a, a + CHUNK)
            logits, p = multiply(low_y[part], low_w.T, dtype), teacher[where[part]]
            ranked[part] = logits.topk(rank, -1).indices if rank > 1 else logits.argmax(-1, keepdim=True)
            norm = logits.logsumexp(-1)
            cross = norm - (p * logits).sum(-1)
            loss += (cross * row_weight[part]).sum()
            if grad_y is not None and grad_w is not None:
                grad = logits.sub_(norm[:, None]).exp_().sub_(p).mul_(row_weight[part, None]).to(dtype)
                grad_y[part] = multiply(grad, low_w, dtype)
                grad_w += multiply(grad.T, low_y[part], dtype)
        if wanted:
            ctx.save_for_backward(grad_y, grad_w)
        ctx.mark_non_differentiable(ranked)
        return loss, ranked

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_y, grad_w = ctx.saved_tensors
        return grad_y * grads[0], grad_w * grads[0], None, None, None, None, None


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of the last dimension (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, half-split form."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
