"""DeepSeek's attention with latent keys and values (2405.04434, 2.1) in one draft layer, spelled out with ``Ops``.

    q        = q_b(norm(q_a x))                   of each head: values without RoPE, then those with it
    c | k_r  = kv_a x;  k | v = kv_b(norm(c))     of each head; k_r, turned, is every head's
    out      = softmax((q k^T + q_r k_r^T) · gain² / sqrt(D)) v

The module's pages hold what this expands to, a key and a value of D = plain + turned values for each head (the value
with zeros behind): one layer of a few tokens' lead, for which the kernels are those of all layers. DeepSeek turns the
pairs (2i, 2i+1): the rows of the weights are put where half-split RoPE has its pairs.
"""

from __future__ import annotations

import torch

from pdspec.cache.paged import DTYPES
from pdspec.model.batch import ForwardBatch
from pdspec.model.ops import Ops, Rope
from pdspec.model.yarn import mscale
from pdspec.spec.attention import Queries, Tensor, paired
from pdspec.spec.geometry import LayerGeometry
from pdspec.spec.mtp.variants import Latent


class LatentAttention:
    """Packed weights; used as ``attention.Attention``."""

    def __init__(
        self, config: LayerGeometry, latent: Latent, tensor: Tensor, *, ops: Ops, dtype: str, pages: torch.Tensor,
        rope: Rope,
    ) -> None:
        self._ops, self._config, self._latent, self._pages, self._rope = ops, config, latent, pages, rope
        self._order = self._pairs()
        kind, heads, attention = DTYPES[dtype], config.num_heads, "self_attn."

        def norm(name: str) -> torch.Tensor:
            return tensor(f"{attention}{name}.weight").float().to(ops.device)

        name = "q_b_proj" if latent.query_rank else "q_proj"
        q = tensor(f"{attention}{name}.weight").unflatten(0, (heads, -1))[:, self._order].flatten(0, 1)
        self._q = ops.pack((q * self._gain() ** 2).to(kind))
        self._q_a = ops.pack(tensor(f"{attention}q_a_proj.weight").to(kind)) if latent.query_rank else None
        self._q_norm = norm("q_a_layernorm") if latent.query_rank else None
        self._kv_a = ops.pack(tensor(f"{attention}kv_a_proj_with_mqa.weight").to(kind))
        self._kv_norm = norm("kv_a_layernorm")
        self._kv_b = ops.pack(tensor(f"{attention}kv_b_proj.weight").to(kind))
        self._o = ops.pack(tensor(f"{attention}o_proj.weight").to(kind))

    def _pairs(self) -> torch.Tensor:
        plain, turned = self._latent.plain, self._latent.turned
        return paired([(plain + 2 * i, plain + 2 * i + 1) for i in range(turned // 2)], plain + turned)

    def _gain(self) -> float:
        """YaRN's, of models that scale queries and keys by it instead of the tables."""
        scaling = self._config.rope_scaling or {}
        weight = scaling.get("mscale_all_dim") if scaling.get("rope_type") == "yarn" else None
        return mscale(float(scaling["factor"]), float(weight)) if weight else 1.0

    def store(self, x: torch.Tensor, batch: ForwardBatch) -> Queries:
        """Writes the KV rows of inputs [R, H] and returns their queries."""
        ops, latent, eps = self._ops, self._latent, self._config.rms_norm_eps
        below = x if self._q_norm is None else ops.rms_norm(ops.linear(x, self._q_a), self._q_norm, eps)
        q = ops.linear(below, self._q)
        compressed = ops.linear(x, self._kv_a)
        c, shared = compressed[:, : latent.rank].contiguous(), compressed[:, latent.rank :]
        heads = ops.linear(ops.rms_norm(c, self._kv_norm, eps), self._kv_b).unflatten(1, (self._config.num_heads, -1))
        k = torch.cat((heads[..., : latent.plain], shared[:, None].expand(-1, heads.shape[1], -1)), 2)
        v = heads[..., latent.plain :]
        filler = v.new_zeros(*v.shape[:2], latent.plain + latent.turned - latent.value)
        rows = torch.cat((q, k[..., self._order].flatten(1), torch.cat((v, filler), 2).flatten(1)), 1)
        return Queries(ops.rope_store(rows.contiguous(), self._rope, batch, self._pages))

    def attend(self, queries: Queries, batch: ForwardBatch) -> torch.Tensor:
        """[R, H]: what attention adds to these rows."""
        mixed = self._ops.attend(queries.q, batch, self._pages).unflatten(1, (self._config.num_heads, -1))
        return self._ops.linear(mixed[..., : self._latent.value].flatten(1).contiguous(), self._o)
