"""What published MTP modules have in place of Llama's attention and MLP, read from ``config.json``. No torch.

    Latent    DeepSeek's attention with latent keys and values (2405.04434, 2.1): q_a_proj … kv_b_proj
    Experts   routed experts with shared ones beside (DeepSeek-V3 report, 2.1.2; Qwen3-Next)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Ranks of the latent query (0: none) and of the latent key and value; a head has ``plain`` values without RoPE
    before ``turned`` with it, of which the key has one for all heads, and ``value`` values."""

    query_rank: int
    rank: int
    plain: int
    turned: int
    value: int

    def shapes(self, prefix: str, hidden: int, heads: int) -> Shapes:
        """Tensors under DeepSeek's keys."""
        q_rows = heads * (self.plain + self.turned)
        query: Shapes = {f"{prefix}.q_proj.weight": (q_rows, hidden)}
        if self.query_rank:
            query = {f"{prefix}.q_a_proj.weight": (self.query_rank, hidden),
                     f"{prefix}.q_a_layernorm.weight": (self.query_rank,),
                     f"{prefix}.q_b_proj.weight": (q_rows, self.query_rank)}  # fmt: skip
        return {
            **query, f"{prefix}.kv_a_proj_with_mqa.weight": (self.rank + self.turned, hidden),
            f"{prefix}.kv_a_layernorm.weight": (self.rank,),
            f"{prefix}.kv_b_proj.weight": (heads * (self.plain + self.value), self.rank),
            f"{prefix}.o_proj.weight": (hidden, heads * self.value),
        }

    def json(self) -> dict[str, Any]:
        """Its keys in ``config.json``."""
        return {"q_lora_rank": self.query_rank or None, "kv_lora_rank": self.rank, "qk_nope_head_dim": self.plain,
                "qk_rope_head_dim": self.turned, "v_head_dim": self.value}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """``count`` routed experts of ``inner`` values, ``chosen`` for a row, and a shared one of ``shared`` values (0:
    none) under ``shared_name``, times the sigmoid of a gate where ``shared_gate``.

    Scores are a softmax over all experts, or with ``biased`` DeepSeek-V3's: sigmoids, to which a bias is added for the
    choice alone, among the ``best_groups`` of ``groups`` whose two best experts are best. ``normed``: the chosen scores
    sum to 1 before ``scale``.
    """

    count: int
    chosen: int
    inner: int
    shared: int
    shared_name: str
    shared_gate: bool
    biased: bool
    normed: bool
    scale: float
    groups: int
    best_groups: int

    def wrong_fields(self) -> list[str]:
        """What cannot be, as ``field=value``."""
        wrong = [f"{name}={size}" for name, size in (("moe_intermediate_size", self.inner), ("shared", self.shared))
                 if size % 16]  # fmt: skip
        if not 1 <= self.chosen <= self.count:
            wrong.append(f"num_experts_per_tok={self.chosen} of {self.count}")
        if self.groups < 1 or self.count % self.groups or not 1 <= self.best_groups <= self.groups:
            wrong.append(f"topk_group={self.best_groups} of n_group={self.groups}")
        return wrong

    def router_shapes(self, prefix: str, hidden: int) -> Shapes:
        """What is no expert's."""
        shapes: Shapes = {f"{prefix}.gate.weight": (self.count, hidden)}
        if self.biased:
            shapes[f"{prefix}.gate.e_score_correction_bias"] = (self.count,)
        if self.shared_gate:
            shapes[f"{prefix}.{self.shared_name}_gate.weight"] = (1, hidden)
        return shapes

    def json(self) -> dict[str, Any]:
        """Its keys in ``config.json``."""
        more: dict[str, Any] = {"shared_expert_intermediate_size": self.shared, "num_experts": self.count}
        if self.biased:
            more = {"n_routed_experts": self.count, "n_shared_experts": self.shared // self.inner,
                    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": self.scale,
                    "n_group": self.groups, "topk_group": self.best_groups}  # fmt: skip
        return {"num_experts_per_tok": self.chosen, "moe_intermediate_size": self.inner, "norm_topk_prob": self.normed,
                **more}


def parse_latent(values: Mapping[str, Any]) -> Latent | None:
    """None without ``kv_lora_rank``. Raises as ``int`` does."""
    if not values.get("kv_lora_rank"):
        return None
    return Latent(query_rank=int(values.get("q_lora_rank") or 0), rank=int(values["kv_lora_rank"]),
                  plain=int(values["qk_nope_head_dim"]), turned=int(values["qk_rope_head_dim"]),
                  value=int(values["v_head_dim"]))


def parse_experts(values: Mapping[str, Any]) -> Experts | None:
    """None for a dense MLP. Raises KeyError, TypeError or ValueError for what makes no sense or another router."""
    deepseek = bool(values.get("n_routed_experts"))
    if not deepseek and not values.get("num_experts"):
        return None
    if deepseek and (values.get("scoring_func"), values.get("topk_method")) != ("sigmoid", "noaux_tc"):
        raise ValueError(f"scoring_func={values.get('scoring_func')} with topk_method={values.get('topk_method')}")
    inner = int(values["moe_intermediate_size"])
    return Experts(
        count=int(values["n_routed_experts" if deepseek else "num_experts"]),
        chosen=int(values["num_experts_per_tok"]), inner=inner,
        shared=inner * int(values.get("n_shared_experts") or 0) if deepseek
        else int(values.get("shared_expert_intermediate_size") or 0),
        shared_name="shared_experts" if deepseek else "shared_expert",
        shared_gate=not deepseek and bool(values.get("shared_expert_intermediate_size")), biased=deepseek,
        normed=bool(values.get("norm_topk_prob", True)), scale=float(values.get("routed_scaling_factor") or 1.0),
        groups=int(values.get("n_group") or 1), best_groups=int(values.get("topk_group") or 1),
    )  # fmt: skip
