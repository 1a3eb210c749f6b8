"""The heads' forward pass (FasterDecoding/Medusa, medusa_model.py), spelled out with ``Ops``.

h                              the target's hidden state of row i, after its final norm
x = h;  x += SiLU(W x + b)     for each residual block of head k
log q(t_{i+2+k}) = log_softmax(lm_head(x))    k = 0, 1, …; t_{i+1} is the target's own; over draft ids
"""

from __future__ import annotations

from typing import Any

import torch

from pdspec.cache.paged import DTYPES
from pdspec.model.ops import Ops
from pdspec.spec.medusa.checkpoint import Heads


class MedusaHeads:
    """Packed weights. Heads without an output matrix of their own use the rows of the draft vocabulary out of the
    target's ``lm_head``, which is packed by the same ``ops``."""

    def __init__(self, heads: Heads, *, ops: Ops, lm_head: Any, dtype: str) -> None:
        self.ops, self.config = ops, heads.config
        kind, tensors, blocks = DTYPES[dtype], heads.tensors, range(heads.config.num_layers)
        self._blocks = [
            [
                (
                    ops.pack(tensors[f"{k}.{j}.linear.weight"].to(kind)),
                    tensors[f"{k}.{j}.linear.bias"].float().to(ops.device),
                )
                for j in blocks
            ]
            for k in range(heads.config.num_heads)
        ]
        if heads.config.own_lm_heads:
            names = [f"{k}.{heads.config.num_layers}.weight" for k in range(heads.config.num_heads)]
            self._outputs = [ops.pack(tensors[name].to(kind)) for name in names]
        else:
            rows = ops.embed(lm_head, heads.target_ids.numpy())
            self._outputs = [ops.pack(rows.to(kind))] * heads.config.num_heads

    def logits(self, hidden: torch.Tensor, head: int) -> torch.Tensor:
        """[R, draft vocabulary] float32 of one head at hidden states [R, H] float32."""
        x = hidden
        for weight, bias in self._blocks[head]:
            inner = self.ops.linear(x, weight, bias)
            # silu_mul by 1: torch's own SiLU rounds a row's end by where it stands among the rows
            x = x + self.ops.silu_mul(torch.cat((inner, torch.ones_like(inner)), 1))
        return self.ops.linear(x, self._outputs[head])
