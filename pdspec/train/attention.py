"""Attention of packed sequences with a gradient of its own: few passes over the scores, products in one type.

A query sees rows 0..i of its sequence (the prefix) and, one each, the rows it made itself in the steps before
(``own``), so that a chain's scores are a causal block and a few single columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pdspec.train.precision import current, multiply, products_in


@dataclass(frozen=True)
class Span:
    """One sequence: its queries are ``start`` .. ``stop``, its keys ``first`` .. ``last``; query ``start`` sees
    ``seen`` of them, every later one one more."""

    start: int
    stop: int
    first: int
    last: int
    seen: int


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor, spans: Sequence[Span]
) -> torch.Tensor:
    """What queries [M, Hq, D] get of keys and values [F, G, D] and of their own [J, M, G, D] → [M, Hq, D]."""
    dtype = current()
    with products_in(torch.float32):  # what is to be rounded is rounded inside
        mixed: torch.Tensor = _Attend.apply(q, k, v, own_k, own_v, tuple(spans), dtype)
    return mixed


def _heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[M, Hq, D] → [G, g M, D]: the query heads of one key head one below the other."""
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """The reverse of ``_heads``: [G, g M, D] → [M, Hq, D]."""
    return x.unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2)


def _own_scores(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[M, G, g, D] with [J, M, G, D] → [M, G, g, J]."""
    return torch.einsum("mhgd,jmhd->mhgj", x, own)


class _Attend(torch.autograd.Function):
    """Saves the probabilities in the product type; the rest of the gradient follows from them."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor,
        spans: tuple[Span, ...], dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        groups, own = k.shape[1], len(own_k)
        scaled = (q / math.sqrt(q.shape[-1])).unflatten(1, (groups, -1))
        own_p = _own_scores(scaled, own_k)  # scores, until each sequence's softmax is written over them
        low_q, low_k, low_v = scaled.flatten(1, 2).to(dtype), k.to(dtype), v.to(dtype)
        out, kept = torch.empty_like(q), []
        for span in spans:
            rows, count = slice(span.start, span.stop), span.stop - span.start
            keys = slice(span.first, span.last)
            scores = multiply(_heads(low_q[rows], groups), low_k[keys].permute(1, 2, 0), dtype)
            scores = scores.unflatten(1, (-1, count))  # [G, g, M, n]
            scores.masked_fill_(_unseen(span), -math.inf)
            if own:
                scores = torch.cat((scores, own_p[rows].permute(1, 2, 0, 3)), -1)
            p = torch.softmax(scores, -1, out=scores)
            if own:
                own_p[rows] = p[..., -own:].permute(2, 0, 1, 3)
                p = p[..., :-own]
            low_p = p.to(dtype).flatten(1, 2)
            out[rows] = _rows(multiply(low_p, low_v[keys].transpose(0, 1), dtype), count)
            kept.append(low_p)
        out += torch.einsum("mhgj,jmhd->mhgd", own_p, own_v).flatten(1, 2)
        ctx.spans, ctx.dtype = spans, dtype
        ctx.save_for_backward(low_q, low_k, low_v, own_k, own_v, own_p, out, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low_q, low_k, low_v, own_k, own_v, own_p, out, *kept = ctx.saved_tensors
        grad, dtype, groups = grads[0], ctx.dtype, low_k.shape[1]
        low_grad, delta = grad.to(dtype), (grad * out).sum(-1)  # [M, Hq]
        grad_q = torch.empty_like(grad)
        grad_k, grad_v = (torch.zeros(x.shape) for x in (low_k, low_v))
        for span, low_p in zip(ctx.spans, kept, strict=True):
            rows, count = slice(span.start, span.stop), span.stop - span.start
            keys = slice(span.first, span.last)
            one, k = _heads(low_grad[rows], groups), low_k[keys].transpose(0, 1)
            change = multiply(one, low_v[keys].permute(1, 2, 0), dtype)
            change.sub_(_heads(delta[rows, :, None], groups)).mul_(low_p)
            low = change.to(dtype)
            grad_q[rows] = _rows(multiply(low, k, dtype), count)
            grad_k[keys] = multiply(low.mT, _heads(low_q[rows], groups), dtype).transpose(0, 1)
            grad_v[keys] = multiply(low_p.mT, one, dtype).transpose(0, 1)
        q, grouped = low_q.float().unflatten(1, (groups, -1)), grad.unflatten(1, (groups, -1))
        change = own_p * (_own_scores(grouped, own_v) - delta.unflatten(1, (groups, -1))[..., None])
        grad_q += torch.einsum("mhgj,jmhd->mhgd", change, own_k).flatten(1, 2)
        grad_own_k = torch.einsum("mhgj,mhgd->jmhd", change, q)
        grad_own_v = torch.einsum("mhgj,mhgd->jmhd", own_p, grouped)
        return grad_q / math.sqrt(grad.shape[-1]), grad_k, grad_v, grad_own_k, grad_own_v, None, None


def _unseen(span: Span) -> torch.Tensor:
    """[M, n] bool: keys beyond what each query sees."""
    seen = span.seen + torch.arange(span.stop - span.start)
    return torch.arange(span.last - span.first)[None] >= seen[:, None]
