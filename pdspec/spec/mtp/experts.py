"""Routed experts of one draft layer, spelled out with ``Ops`` (see ``variants.Experts``).

    s = softmax(gate x), or sigmoid(gate x) with a bias for the choice alone
    y = scale · Σ s_e expert_e(x) / Σ s_e over the chosen + sigmoid(shared_gate x) · shared(x)
"""

from __future__ import annotations

import torch

from pdspec.model.ops import Ops
from pdspec.spec.attention import SwiGlu, Tensor, sigmoid
from pdspec.spec.mtp.variants import Experts


class RoutedExperts:
    """Packed weights; the router's stay float32, as a choice hangs on them."""

    def __init__(self, experts: Experts, tensor: Tensor, *, ops: Ops, dtype: str) -> None:
        self._ops, self._experts = ops, experts
        self._gate = ops.pack(tensor("mlp.gate.weight").float())
        self._bias = (
            tensor("mlp.gate.e_score_correction_bias").double().to(ops.device) if experts.biased else None
        )
        self._each = [SwiGlu(tensor, f"mlp.experts.{n}", ops=ops, dtype=dtype) for n in range(experts.count)]
        name = f"mlp.{experts.shared_name}"
        self._shared = SwiGlu(tensor, name, ops=ops, dtype=dtype) if experts.shared else None
        self._shared_gate = ops.pack(tensor(f"{name}_gate.weight").float()) if experts.shared_gate else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H] of [R, H]."""
        chosen, weights = self._route(x)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            out[rows] += self._each[expert](x[rows]) * weights[rows, places, None]
        if self._shared is None:
            return out
        shared = self._shared(x)
        return out + (shared if self._shared_gate is None else shared * sigmoid(self._ops.linear(x, self._shared_gate)))

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts [R, chosen], their weights). In float64: a choice must not depend on a row's neighbours."""
        experts, scores = self._experts, self._ops.linear(x, self._gate).double()
        scores = scores.sigmoid() if experts.biased else scores.softmax(-1)
        wanted = scores if self._bias is None else scores + self._bias
        if experts.best_groups < experts.groups:
            grouped = wanted.unflatten(1, (experts.groups, -1))
            best = grouped.topk(min(2, grouped.shape[2]), -1).values.sum(-1).topk(experts.best_groups, -1).indices
            open_ = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
            wanted = grouped.masked_fill(~open_[..., None], -torch.inf).flatten(1)
        chosen = wanted.topk(experts.chosen, -1).indices
        weights = scores.gather(1, chosen)
        if experts.normed:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if experts.biased else 0.0))
        return chosen, (weights * experts.scale).float()
