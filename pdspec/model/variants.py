"""Layers that are not Llama's, as ``config.json`` has them: latent attention and mixtures of experts. No torch.

DeepSeek-V3 (2412.19437, 2.1) has both, Mixtral (2401.04088) and Qwen3-MoE (2505.09388) the experts. A setting that
would make the layer another one is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdspec.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]
MLA_ARCHITECTURES = ("DeepseekV3ForCausalLM",)
MOE_ARCHITECTURES = (*MLA_ARCHITECTURES, "MixtralForCausalLM", "Qwen3MoeForCausalLM")


@dataclass(frozen=True, kw_only=True)
class Mla:
    """Multi-head latent attention: a token's KV row is ``kv_lora_rank`` + ``rope_head_dim`` values for all heads."""

    kv_lora_rank: int
    q_lora_rank: int  # 0: queries are not compressed
    nope_head_dim: int  # of a query or key, the part without RoPE
    rope_head_dim: int
    v_head_dim: int
    interleaved: bool  # the checkpoint's RoPE pairs are neighbours (x0, x1), not halves

    @property
    def row_dim(self) -> int:
        """Values of one KV row."""
        return self.kv_lora_rank + self.rope_head_dim

    @property
    def kernel_sizes(self) -> dict[str, int]:
        """Sizes that the CPU kernels need in multiples of 16."""
        return {"kv_lora_rank": self.kv_lora_rank, "q_lora_rank": self.q_lora_rank, "v_head_dim": self.v_head_dim,
                "qk_nope_head_dim": self.nope_head_dim, "qk_rope_head_dim": self.rope_head_dim}

    def shapes(self, hidden: int, heads: int) -> Shapes:
        """Tensors of one layer's attention, by the rest of their keys."""
        q_rows, inner = heads * (self.nope_head_dim + self.rope_head_dim), self.q_lora_rank or hidden
        compressed: Shapes = {
            "self_attn.q_a_proj.weight": (self.q_lora_rank, hidden),
            "self_attn.q_a_layernorm.weight": (self.q_lora_rank,),
        }
        return {
            **(compressed if self.q_lora_rank else {}),
            f"self_attn.{'q_b_proj' if self.q_lora_rank else 'q_proj'}.weight": (q_rows, inner),
            "self_attn.kv_a_proj_with_mqa.weight": (self.row_dim, hidden),
            "self_attn.kv_a_layernorm.weight": (self.kv_lora_rank,),
            "self_attn.kv_b_proj.weight": (heads * (self.nope_head_dim + self.v_head_dim), self.kv_lora_rank),
            "self_attn.o_proj.weight": (hidden, heads * self.v_head_dim),
        }

    def wrong_fields(self) -> list[str]:
        """What cannot be, by the keys that checkpoints have."""
        sizes = {"kv_lora_rank": self.kv_lora_rank, "qk_nope_head_dim": self.nope_head_dim,
                 "qk_rope_head_dim": self.rope_head_dim, "v_head_dim": self.v_head_dim}
        wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1]
        return wrong + ([f"qk_rope_head_dim={self.rope_head_dim} is odd"] if self.rope_head_dim % 2 else [])


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Mixture of experts. A token's experts are the best by score, plus bias where there is one, out of the best
    groups; their weights are the scores without bias, ``normalise``d to a sum of 1, times ``scaling``."""

    num_experts: int
    experts_per_token: int
    expert_size: int  # intermediate size of each
    dense_layers: tuple[int, ...]  # layers that have an ordinary MLP
    scoring: str = "softmax"  # | "sigmoid"
    normalise: bool = True
    scaling: float = 1.0
    bias: bool = False  # e_score_correction_bias: it takes part in the choice alone
    groups: int = 1
    groups_per_token: int = 1
    shared_size: int = 0  # intermediate size of the shared experts, which every token passes; 0: there are none
    shared_gate: bool = False  # their output is multiplied with the sigmoid of a product of its own (Qwen3-Next)
    shared_name: str = "shared_experts"
    block: str = "mlp"  # the keys' name for the layer's mixture ...
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # ... and for an expert's matrices

    @property
    def kernel_sizes(self) -> dict[str, int]:
        """Sizes that the CPU kernels need in multiples of 16."""
        return {"moe_intermediate_size": self.expert_size, "shared experts' size": self.shared_size}

    def shapes(self, hidden: int) -> Shapes:
        """Tensors of one layer's mixture, by the rest of their keys."""
        gate, up, down = self.names
        size = self.expert_size
        shapes: Shapes = {f"{self.block}.gate.weight": (self.num_experts, hidden)}
        if self.bias:
            shapes[f"{self.block}.gate.e_score_correction_bias"] = (self.num_experts,)
        for expert in range(self.num_experts):
            prefix = f"{self.block}.experts.{expert}."
            shapes |= {f"{prefix}{gate}.weight": (size, hidden), f"{prefix}{up}.weight": (size, hidden),
                       f"{prefix}{down}.weight": (hidden, size)}
        shared = f"{self.block}.{self.shared_name}"
        if self.shared_gate:
            shapes[f"{shared}_gate.weight"] = (1, hidden)
        return {**shapes, **(mlp_shapes(shared, hidden, self.shared_size) if self.shared_size else {})}

    def wrong_fields(self) -> list[str]:
        """What cannot be, as ``field=value``."""
        sizes = {"num_experts": self.num_experts, "experts_per_token": self.experts_per_token,
                 "expert_size": self.expert_size, "groups": self.groups, "groups_per_token": self.groups_per_token}
        wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1]
        if wrong:
            return wrong
        each = self.num_experts // self.groups
        if self.num_experts % self.groups or (self.groups > 1 and each < 2):
            wrong.append(f"{self.num_experts} experts in {self.groups} groups")
        if self.groups_per_token > self.groups:
            wrong.append(f"topk_group={self.groups_per_token} of n_group={self.groups}")
        elif self.experts_per_token > self.groups_per_token * each:
            wrong.append(f"num_experts_per_tok={self.experts_per_token} of {self.groups_per_token * each}")
        return wrong


def mlp_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    """SwiGLU's matrices under ``prefix``."""
    return {f"{prefix}.gate_proj.weight": (inner, hidden), f"{prefix}.up_proj.weight": (inner, hidden),
            f"{prefix}.down_proj.weight": (hidden, inner)}


def parse_mla(values: Mapping[str, Any], architecture: str) -> Mla | None:
    """None for attention with keys and values of its own. Raises KeyError for a missing field."""
    if architecture not in MLA_ARCHITECTURES:
        return None
    return Mla(
        kv_lora_rank=int(values["kv_lora_rank"]), q_lora_rank=int(values.get("q_lora_rank") or 0),
        nope_head_dim=int(values["qk_nope_head_dim"]), rope_head_dim=int(values["qk_rope_head_dim"]),
        v_head_dim=int(values["v_head_dim"]), interleaved=bool(values.get("rope_interleave", True)),
    )


def parse_moe(values: Mapping[str, Any], architecture: str, name: str) -> Moe | None:
    """None without experts. Raises KeyError for a missing field, ConfigError for routing that is not built."""
    if architecture not in MOE_ARCHITECTURES:
        return None
    layers = range(int(values["num_hidden_layers"]))
    if architecture == "MixtralForCausalLM":
        return Moe(
            num_experts=int(values["num_local_experts"]), experts_per_token=int(values["num_experts_per_tok"]),
            expert_size=int(values["intermediate_size"]), dense_layers=(), block="block_sparse_moe",
            names=("w1", "w3", "w2"),
        )
    if architecture == "Qwen3MoeForCausalLM":
        step, only = int(values.get("decoder_sparse_step", 1)), values.get("mlp_only_layers") or ()
        return Moe(
            num_experts=int(values.get("num_experts") or values["num_local_experts"]),
            experts_per_token=int(values["num_experts_per_tok"]), expert_size=int(values["moe_intermediate_size"]),
            dense_layers=tuple(layer for layer in layers if layer in only or (layer + 1) % step),
            normalise=bool(values.get("norm_topk_prob", False)),
        )
    _refuse_other_routing(values, name)
    size = int(values["moe_intermediate_size"])
    return Moe(
        num_experts=int(values["n_routed_experts"]), experts_per_token=int(values["num_experts_per_tok"]),
        expert_size=size, dense_layers=tuple(layers[: int(values.get("first_k_dense_replace") or 0)]),
        scoring="sigmoid", normalise=bool(values.get("norm_topk_prob", True)),
        scaling=float(values.get("routed_scaling_factor", 1.0)), bias=True,
        groups=int(values.get("n_group") or 1), groups_per_token=int(values.get("topk_group") or 1),
        shared_size=size * int(values.get("n_shared_experts") or 0),
    )


def _refuse_other_routing(values: Mapping[str, Any], name: str) -> None:
    """DeepSeek-V2 routes otherwise under nearly the same keys."""
    for key, built in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        if values.get(key, built) != built:
            raise ConfigError(
                f"{name} sets {key} to {values[key]!r}, which pdspec cannot run", field="model",
                remedy=f"choose a checkpoint with {key} {built!r}, as DeepSeek-V3 has it",
            )
