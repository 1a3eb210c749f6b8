"""The parts of a decoder layer, packed once, spelled out with ``Ops``: attention with keys and values or with latent
KV, an MLP or a mixture of experts.

An attention's two steps stand alone, because a draft layer writes the KV rows of tokens whose output nobody reads:

    q = attention.store(norm(x), batch, pages)        the rows' KV goes into the pages
    attention.attend(q, batch, pages, out=x)          adds what the rows see to x [R, H]
    mlp.add(norm(x), out=x)

Every row is computed by operations that depend on that row alone: kernels of ``NativeOps``, or products and sums of
single elements, which torch rounds the same wherever they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pdspec.model.batch import ForwardBatch
from pdspec.model.config import ModelConfig
from pdspec.model.ops import Ops, Rope, rotate, store_latent
from pdspec.model.variants import Mla, Moe
from pdspec.model.yarn import softmax_factor

LATENT_EPS = 1e-6  # of the norms inside MLA, whatever rms_norm_eps is


@dataclass(frozen=True)
class LayerTensors:
    """A layer's tensors, taken out of ``tensors`` by the rest of their keys; matrices are packed in ``dtype``."""

    tensors: dict[str, torch.Tensor]
    prefix: str
    ops: Ops
    dtype: torch.dtype

    def take(self, name: str) -> torch.Tensor:
        """As it is; it leaves ``tensors``."""
        return self.tensors.pop(f"{self.prefix}.{name}")

    def matrix(self, *names: str) -> Any:
        """Packed, one below the other."""
        return self.pack(torch.cat([self.take(f"{name}.weight") for name in names]))

    def vector(self, *names: str) -> torch.Tensor:
        """float32, one behind the other."""
        return torch.cat([self.take(name) for name in names]).float().to(self.ops.device)

    def pack(self, weight: torch.Tensor) -> Any:
        """[N, K] in ``dtype``, packed."""
        return self.ops.pack(weight.to(self.dtype))


class AttentionLayer(Protocol):
    """See above."""

    def store(self, x: torch.Tensor, batch: ForwardBatch, pages: torch.Tensor) -> torch.Tensor:
        """Queries [R, heads, D] of normed x [R, H]; the rows' KV goes to their slots."""

    def attend(self, q: torch.Tensor, batch: ForwardBatch, pages: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the attention's output to ``out`` [R, H]."""


class MlpLayer(Protocol):
    """See above."""

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Adds the output for normed x [R, H] to ``out`` [R, H]."""


class Attention:
    """Grouped-query attention with RoPE."""

    def __init__(self, config: ModelConfig, tensors: LayerTensors, rope: Rope) -> None:
        self._ops, self._rope, self._eps = tensors.ops, rope, config.rms_norm_eps
        self.qkv = tensors.matrix(*(f"self_attn.{letter}_proj" for letter in "qkv"))
        self.bias = tensors.vector(*(f"self_attn.{letter}_proj.bias" for letter in "qkv")) if config.qkv_bias else None
        self.q_norm = tensors.vector("self_attn.q_norm.weight") if config.qk_norm else None
        self.k_norm = tensors.vector("self_attn.k_norm.weight") if config.qk_norm else None
        self.o = tensors.matrix("self_attn.o_proj")

    def store(self, x: torch.Tensor, batch: ForwardBatch, pages: torch.Tensor) -> torch.Tensor:
        qkv = self._ops.linear(x, self.qkv, self.bias)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm, self._eps)
        return self._ops.rope_store(qkv, self._rope, batch, pages, norms)

    def attend(self, q: torch.Tensor, batch: ForwardBatch, pages: torch.Tensor, out: torch.Tensor) -> None:
        self._ops.linear(self._ops.attend(q, batch, pages), self.o, out=out, add=True)


class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434, 2.1) over latent KV: W_UK is absorbed into the query, W_UV
    into the output, so that nothing is expanded, in the pages or out of them. Head i, row t:

        row_t = [norm(W_DKV x_t) ; RoPE(W_KR x_t)]                      what the pages hold
        q_i   = [W_UK_i^T q^C_i ; RoPE(q^R_i)]                          q^C, q^R: q_proj x, or q_b_proj norm(q_a_proj x)
        out_i = W_UV_i sum_t softmax(scale q_i row_t) row_t[:rank]
    """

    def __init__(
        self, mla: Mla, heads: int, tensors: LayerTensors, rope: Rope, rope_scaling: dict[str, Any] | None
    ) -> None:
        self._ops, self._rope, self._mla, self._heads = tensors.ops, rope, mla, heads
        nope, rank = mla.nope_head_dim, mla.kv_lora_rank
        self._q_a = tensors.matrix("self_attn.q_a_proj") if mla.q_lora_rank else None
        self._q_norm = tensors.vector("self_attn.q_a_layernorm.weight") if mla.q_lora_rank else None
        q = tensors.take(f"self_attn.{'q_b_proj' if mla.q_lora_rank else 'q_proj'}.weight")
        q = q.unflatten(0, (self._heads, nope + mla.rope_head_dim))
        self._q = tensors.pack(torch.cat((q[:, :nope], self._halves(q[:, nope:])), 1).flatten(0, 1))
        down = tensors.take("self_attn.kv_a_proj_with_mqa.weight")
        self.hidden_size = down.shape[1]
        self._kv_a = tensors.pack(torch.cat((down[:rank], self._halves(down[None, rank:])[0])))
        self._kv_norm = tensors.vector("self_attn.kv_a_layernorm.weight")
        up = tensors.take("self_attn.kv_b_proj.weight").unflatten(0, (self._heads, nope + mla.v_head_dim))
        self._k_up = self._ops.pack_heads(up[:, :nope].transpose(1, 2).to(tensors.dtype))
        self._v_up = self._ops.pack_heads(up[:, nope:].to(tensors.dtype))
        self._o = tensors.matrix("self_attn.o_proj")
        # ``Ops.attend`` divides by the root of a row's size.
        scale = softmax_factor(rope_scaling) / math.sqrt(nope + mla.rope_head_dim)
        self._scale = scale * math.sqrt(mla.row_dim)

    def _halves(self, weight: torch.Tensor) -> torch.Tensor:
        """Rows [n, D, K] that RoPE turns in pairs of neighbours, moved so that it turns halves."""
        return torch.cat((weight[:, 0::2], weight[:, 1::2]), 1) if self._mla.interleaved else weight

    def store(self, x: torch.Tensor, batch: ForwardBatch, pages: torch.Tensor) -> torch.Tensor:
        """Queries [R, heads, rank + rope] that meet the rows of the pages."""
        ops, mla, rank = self._ops, self._mla, self._mla.kv_lora_rank
        down = ops.linear(x, self._kv_a)
        if self._q_a is not None and self._q_norm is not None:
            x = ops.rms_norm(ops.linear(x, self._q_a), self._q_norm, LATENT_EPS)
        q = ops.linear(x, self._q).unflatten(1, (self._heads, mla.nope_head_dim + mla.rope_head_dim))
        cos, sin = self._rope.at(batch.positions)
        latent = ops.rms_norm(down[:, :rank], self._kv_norm, LATENT_EPS)
        store_latent(torch.cat((latent, rotate(down[:, rank:], cos, sin)), 1), batch, pages)
        absorbed = ops.per_head(q[..., : mla.nope_head_dim], self._k_up)
        turned = rotate(q[..., mla.nope_head_dim :], cos[:, None], sin[:, None])
        return torch.cat((absorbed, turned), -1) * self._scale

    def attend(self, q: torch.Tensor, batch: ForwardBatch, pages: torch.Tensor, out: torch.Tensor) -> None:
        mixed = self._ops.attend(q, batch, pages).unflatten(1, (self._heads, self._mla.row_dim))
        values = self._ops.per_head(mixed[..., : self._mla.kv_lora_rank], self._v_up)
        self._ops.linear(values.flatten(1), self._o, out=out, add=True)


class Mlp:
    """SwiGLU."""

    def __init__(self, tensors: LayerTensors, block: str = "mlp", names: tuple[str, str, str] | None = None) -> None:
        gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
        self._ops = tensors.ops
        self.gate_up = tensors.matrix(f"{block}.{gate}", f"{block}.{up}")
        self.down = tensors.matrix(f"{block}.{down}")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H] of normed x [R, H]."""
        return self._ops.linear(self._ops.silu_mul(self._ops.linear(x, self.gate_up)), self.down)

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._ops.linear(self._ops.silu_mul(self._ops.linear(x, self.gate_up)), self.down, out=out, add=True)


class Experts:
    """A mixture of experts: each runs once over the rows that chose it. A row's sum is taken in the order of its own
    choice, best first, so that it does not depend on what its neighbours chose."""

    def __init__(self, moe: Moe, tensors: LayerTensors) -> None:
        self._moe, self._ops = moe, tensors.ops
        self._gate = tensors.matrix(f"{moe.block}.gate")
        self._bias = tensors.vector(f"{moe.block}.gate.e_score_correction_bias") if moe.bias else None
        self._experts = [
            Mlp(tensors, f"{moe.block}.experts.{expert}", moe.names) for expert in range(moe.num_experts)
        ]
        shared = f"{moe.block}.{moe.shared_name}"
        self._shared = Mlp(tensors, shared) if moe.shared_size else None
        self._shared_gate = tensors.matrix(f"{shared}_gate") if moe.shared_gate else None

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.add_(self(x))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H] of normed x [R, H]."""
        ids, weights = self._ops.route(self._ops.linear(x, self._gate), self._moe, self._bias)
        chosen = ids.reshape(-1)
        each = x.new_empty(len(chosen), x.shape[1])  # of pair (row, choice)
        for expert in np.unique(chosen):
            pairs = torch.from_numpy(np.flatnonzero(chosen == expert)).to(self._ops.device)
            each[pairs] = self._experts[expert](x[pairs // ids.shape[1]])
        each = each.unflatten(0, ids.shape) * weights[..., None]
        total = each[:, 0]
        for choice in range(1, ids.shape[1]):
            total = total + each[:, choice]
        if self._shared is None:
            return total
        shared = self._shared(x)
        if self._shared_gate is not None:
            shared = shared * sigmoid(self._ops.linear(x, self._shared_gate))
        return total + shared


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """In float64 and rounded: torch's own in float32 rounds a row's end by where it stands among the rows."""
    return torch.sigmoid(x.double()).float()


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its parts and the norms in front of them."""

    attention: AttentionLayer
    mlp: MlpLayer
    input_norm: torch.Tensor
    post_norm: torch.Tensor


def make_layer(config: ModelConfig, index: int, tensors: LayerTensors, rope: Rope) -> Layer:
    """Layer ``index`` of ``config``, its tensors taken out of ``tensors``."""
    moe, attention = config.experts_of(index), Attention(config, tensors, rope) if config.mla is None else (
        LatentAttention(config.mla, config.num_heads, tensors, rope, config.rope_scaling)
    )
    return Layer(
        attention, Experts(moe, tensors) if moe else Mlp(tensors),
        tensors.vector("input_layernorm.weight"), tensors.vector("post_attention_layernorm.weight"),
    )
