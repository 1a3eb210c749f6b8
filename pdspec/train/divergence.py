"""How far a draft's distribution q is from the target's p over the draft vocabulary, with its gradient.

cross-entropy     -Σ p log q
kl                Σ p log(p / q): the same gradient, and a loss of 0 where q = p
total-variation   ½ Σ |p - q|: one minus the chance that a token drawn from q survives verification
                  (Leviathan et al., 2211.17192, definition 3.2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pdspec.train.precision import current, multiply, products_in

CHUNK = 64  # rows of logits in the cache at a time
Judged = tuple[torch.Tensor, torch.Tensor]  # the loss of each row [m], its gradient by the logits [m, V]


def _cross_entropy(p: torch.Tensor, logits: torch.Tensor, q: torch.Tensor, norm: torch.Tensor) -> Judged:
    return norm - torch.linalg.vecdot(p, logits), q.sub_(p)


def _kl(p: torch.Tensor, logits: torch.Tensor, q: torch.Tensor, norm: torch.Tensor) -> Judged:
    cross, gradient = _cross_entropy(p, logits, q, norm)
    return cross + torch.xlogy(p, p).sum(-1), gradient


def _total_variation(p: torch.Tensor, logits: torch.Tensor, q: torch.Tensor, norm: torch.Tensor) -> Judged:
    over = q * (q > p)  # what q has too much of, whole
    return (q - p).clamp_(min=0).sum(-1), over - q * over.sum(-1, keepdim=True)


_KINDS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Judged]] = {
    "cross-entropy": _cross_entropy, "kl": _kl, "total-variation": _total_variation,
}  # fmt: skip
LOSSES = tuple(_KINDS)


def divergence(
    kind: str, y: torch.Tensor, output: torch.Tensor, teacher: torch.Tensor, where: torch.Tensor,
    row_weight: torch.Tensor, rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Σ_m row_weight_m · loss(teacher[where_m], softmax(y_m Wᵀ)), and the best ``rank`` ids of every row [M, rank].
    y [M, H], ``output`` W [V, H], teacher [T, V], where and row_weight [M]; ``kind`` one of LOSSES."""
    dtype = current()
    with products_in(torch.float32):  # what is to be rounded is rounded inside
        loss, ranked = _Divergence.apply(kind, y, output, teacher, where, row_weight, rank, dtype)
    return loss, ranked


class _Divergence(torch.autograd.Function):
    """The logits of all rows turn into their gradient in place, a few rows (what the cache holds) at a time."""

    @staticmethod
    def forward(
        ctx: Any, kind: str, y: torch.Tensor, output: torch.Tensor, teacher: torch.Tensor, where: torch.Tensor,
        row_weight: torch.Tensor, rank: int, dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        low_output = output.to(dtype)
        change = multiply(y.to(dtype), low_output.T, dtype, out=dtype)  # logits, until their gradient overwrites them
        losses, ranked = y.new_empty(len(y)), torch.empty(len(y), rank, dtype=torch.int64)
        for start in range(0, len(y), CHUNK):
            part = slice(start, start + CHUNK)
            logits, p = change[part].float(), teacher[where[part]]
            best, ranked[part] = logits.topk(rank, -1) if rank > 1 else logits.max(-1, keepdim=True)
            q = logits.softmax(-1)
            norm = best[:, 0] - q.gather(1, ranked[part, :1])[:, 0].log()  # log Σ exp of the logits
            losses[part], gradient = _KINDS[kind](p, logits, q, norm)
            change[part] = gradient
        if any(ctx.needs_input_grad[1:3]):
            grad_y = multiply(change, low_output, dtype).mul_(row_weight[:, None])
            weighed = (y * row_weight[:, None]).to(dtype)
            ctx.save_for_backward(grad_y, multiply(change.T, weighed, dtype) if ctx.needs_input_grad[2] else None)
        ctx.mark_non_differentiable(ranked)
        return torch.dot(losses, row_weight), ranked

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_y, grad_w = ctx.saved_tensors
        given = (grad_y * grads[0], None if grad_w is None else grad_w * grads[0])
        return None, *given, None, None, None, None, None
