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
from pdspec.train.precision import current, multiply, product, products_in

CHUNK = 64  # rows of logits in the cache at a time


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
    dtype = current()
    with products_in(torch.float32):  # what is to be rounded is rounded inside
        loss, ranked = SoftCrossEntropy.apply(y, output, teacher_p, where, weight, max(rank, 1), dtype)
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
    """Σ_m weight_m · H(p_m, softmax(y_m Wᵀ)) and the best ids. The logits of all rows turn into their gradient in
    place, a few rows (what the cache holds) at a time."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, weight_VH: torch.Tensor, teacher: torch.Tensor, where: torch.Tensor,
        row_weight: torch.Tensor, rank: int, dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """y [M, H], teacher [T, V], where [M] rows of teacher, row_weight [M] → loss [], ids [M, rank].
        Products in ``dtype``."""
        low_w = weight_VH.to(dtype)
        change = multiply(y.to(dtype), low_w.T, dtype, out=dtype)  # logits, until q - p is written over them
        cross, ranked = y.new_empty(len(y)), torch.empty(len(y), rank, dtype=torch.int64)
        for start in range(0, len(y), CHUNK):
            part = slice(start, start + CHUNK)
            logits, p = change[part].float(), teacher[where[part]]
            best, ranked[part] = logits.topk(rank, -1) if rank > 1 else logits.max(-1, keepdim=True)
            cross[part] = -torch.linalg.vecdot(p, logits)
            q = torch.softmax(logits, -1, out=logits) if dtype != torch.float32 else logits.softmax(-1)
            cross[part] += best[:, 0] - q.gather(1, ranked[part, :1])[:, 0].log()  # log Σ exp of the logits
            change[part] = q.sub_(p)
        if any(ctx.needs_input_grad[:2]):
            grad_y = multiply(change, low_w, dtype).mul_(row_weight[:, None])
            weighted_y = (y * row_weight[:, None]).to(dtype)
            ctx.save_for_backward(grad_y, multiply(change.T, weighted_y, dtype) if ctx.needs_input_grad[1] else None)
        ctx.mark_non_differentiable(ranked)
        return torch.dot(cross, row_weight), ranked

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_y, grad_w = ctx.saved_tensors
        return grad_y * grads[0], None if grad_w is None else grad_w * grads[0], None, None, None, None, None


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of the last dimension (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, half-split form."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
