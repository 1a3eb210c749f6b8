"""One decoder layer over packed sequences, as the heads of EAGLE and MTP train it.

Sequences are packed, not padded: F rows in all. Chains continue them: in step j ≥ 1 a row stands at position i+j and
attends to the rows 0..i of step 0 and to its own rows of steps 1..j, exactly as a chain drafted from row i does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch.nn import functional as F

from pdspec.errors import ConfigError
from pdspec.model.ops import Rope, make_rope
from pdspec.spec.geometry import LayerGeometry
from pdspec.train.attention import Span, attend
from pdspec.train.packing import Keys, Packed
from pdspec.train.precision import product
from pdspec.train.scoring import rms, rotate

Weights = Mapping[str, torch.Tensor]


class PackedLayer:
    """``prefix`` is what the layer's keys begin with; ``weights`` may be parameters. Raises ConfigError for a layer
    with more than Llama's has."""

    def __init__(self, geometry: LayerGeometry, weights: Weights, prefix: str, max_positions: int) -> None:
        if not geometry.is_plain:
            raise ConfigError("only heads of Llama's layer can be trained on, this one has more", field="head",
                              remedy="start from another head, or from none")
        self.geometry, self.weights, self.prefix = geometry, weights, prefix
        self.rope: Rope = make_rope(
            head_dim=geometry.head_dim, theta=geometry.rope_theta, max_positions=max_positions,
            scaling=geometry.rope_scaling,
        )  # fmt: skip

    def weight(self, name: str) -> torch.Tensor:
        """A tensor of the layer."""
        return self.weights[f"{self.prefix}.{name}.weight"]

    def qkv(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [R, Hq, D] and k, and v, of inputs [R, *]."""
        geometry = self.geometry
        fused = torch.cat([self.weight(f"self_attn.{letter}_proj") for letter in "qkv"])
        heads = product(x, fused).unflatten(1, (-1, geometry.head_dim))
        cos, sin = self.rope.cos[positions][:, None], self.rope.sin[positions][:, None]
        q, k, v = heads.split((geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads), 1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attended(self, q: torch.Tensor, keys: Keys, packed: Packed, alive: torch.Tensor) -> torch.Tensor:
        """[M, H]: what attention adds, of queries [M, Hq, D]; ``alive`` says which of the batch's they are."""
        spans, start = [], 0
        for sequence, count in enumerate(packed.counts(alive)):
            if count:
                first, last = packed.bounds[sequence], packed.bounds[sequence + 1]
                seen = int(packed.query[alive[start]]) - first + 1
                spans.append(Span(start, start + count, first, last, seen))
            start += count
        own_k, own_v = keys.own(alive)
        return self._out(attend(q, keys.k, keys.v, own_k, own_v, spans))

    def _out(self, mixed: torch.Tensor) -> torch.Tensor:
        return product(mixed.flatten(1), self.weight("self_attn.o_proj"))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to a residual [R, H]."""
        normed = rms(x, self.weight("post_attention_layernorm"), self.geometry.rms_norm_eps)
        gate = F.silu(product(normed, self.weight("mlp.gate_proj")))
        return product(gate * product(normed, self.weight("mlp.up_proj")), self.weight("mlp.down_proj"))

    def whole(
        self, x: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor, bounds: Sequence[int]
    ) -> torch.Tensor:
        """The layer's output [F, H] of all rows of all sequences: row i sees rows 0..i of its own."""
        q, k, v = self.qkv(x, positions)
        none = k.new_empty(0, len(q), *k.shape[1:])
        spans = [Span(first, last, first, last, 1) for first, last in pairwise(bounds) if last > first]
        hidden = residual + self._out(attend(q, k, v, none, none, spans))
        return hidden + self.mlp(hidden)
