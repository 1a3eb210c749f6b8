"""One decoder layer over packed sequences, as the heads of EAGLE and MTP train it.

Sequences are packed, not padded: F rows in all. Chains continue them: in step j ≥ 1 a row stands at position i+j and
attends to the rows 0..i of step 0 and to its own rows of steps 1..j, exactly as a chain drafted from row i does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch.nn import functional as F

from pdspec.errors import ConfigError
from pdspec.model.ops import Rope, make_rope
from pdspec.spec.geometry import LayerGeometry
from pdspec.train.packing import Keys, Packed
from pdspec.train.precision import product, products_in
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
        with products_in(torch.float32):
            mixed = self._mixed(q, keys, packed, alive)
        return product(mixed, self.weight("self_attn.o_proj"))

    def _mixed(self, q: torch.Tensor, keys: Keys, packed: Packed, alive: torch.Tensor) -> torch.Tensor:
        """Values of the keys that each query sees, [M, Hq D]. Each sequence on its own; own rows of later steps enter as
        single columns."""
        config, out = self.geometry, []
        groups = config.num_heads // config.num_kv_heads
        q = (q / math.sqrt(config.head_dim)).unflatten(1, (config.num_kv_heads, groups))  # [M, G, g, D]
        own_k = [k[alive] for k in keys.own_k]
        own_v = [v[alive] for v in keys.own_v]
        own = [torch.einsum("mhgd,mhd->hgm", q, k) for k in own_k]
        start = 0
        for sequence, count in enumerate(packed.counts(alive)):
            stop = start + count
            first, last = packed.bounds[sequence], packed.bounds[sequence + 1]
            k, v = keys.k[first:last], keys.v[first:last]
            scores = torch.einsum("mhgd,nhd->hgmn", q[start:stop], k)
            rows = packed.query[alive[start:stop]] - first
            scores = scores.masked_fill(torch.arange(last - first)[None] > rows[:, None], -math.inf)
            extra = [s[:, :, start:stop, None] for s in own]
            p = torch.cat([scores, *extra], -1).softmax(-1)
            mixed = torch.einsum("hgmn,nhd->mhgd", p[..., : last - first], v)
            for j, value in enumerate(own_v):
                mixed = mixed + torch.einsum("hgm,mhd->mhgd", p[..., last - first + j], value[start:stop])
            out.append(mixed.flatten(1))
            start = stop
        return torch.cat(out)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to a residual [R, H]."""
        normed = rms(x, self.weight("post_attention_layernorm"), self.geometry.rms_norm_eps)
        gate = F.silu(product(normed, self.weight("mlp.gate_proj")))
        return product(gate * product(normed, self.weight("mlp.up_proj")), self.weight("mlp.down_proj"))

    def whole(
        self, x: torch.Tensor, residual: torch.Tensor, positions: torch.Tensor, bounds: Sequence[int]
    ) -> torch.Tensor:
        """The layer's output [F, H] of all rows of all sequences: row i sees rows 0..i of its own."""
        geometry, out = self.geometry, []
        groups = geometry.num_heads // geometry.num_kv_heads
        q, k, v = self.qkv(x, positions)
        for first, last in pairwise(bounds):
            one = [part[first:last].transpose(0, 1)[None] for part in (q, k, v)]
            keys, values = (part.repeat_interleave(groups, 1) for part in one[1:])
            with products_in(torch.float32):
                mixed = F.scaled_dot_product_attention(one[0], keys, values, is_causal=True)
            out.append(mixed[0].transpose(0, 1).flatten(1))
        hidden = residual + product(torch.cat(out), self.weight("self_attn.o_proj"))
        return hidden + self.mlp(hidden)
