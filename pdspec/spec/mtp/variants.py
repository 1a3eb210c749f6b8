"""What published MTP modules have in place of Llama's attention and MLP: latent attention and experts, as targets have
them (``model.variants``). No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pdspec.model.variants import Mla, Moe, parse_mla, parse_moe


def parse_variants(values: Mapping[str, Any], where: Path) -> tuple[Mla | None, Moe | None]:
    """Of DeepSeek-V3 and Qwen3-Next style configs. Raises KeyError, TypeError or ValueError for what makes no sense,
    ConfigError for another router."""
    mla = parse_mla(values, "DeepseekV3ForCausalLM") if values.get("kv_lora_rank") else None
    moe = None
    if values.get("n_routed_experts"):
        moe = parse_moe(values, "DeepseekV3ForCausalLM", str(where))
    elif values.get("num_experts"):
        moe = parse_moe({"norm_topk_prob": True, **values}, "Qwen3MoeForCausalLM", str(where))
        shared = int(values.get("shared_expert_intermediate_size") or 0)
        if moe is not None and shared:
            moe = replace(moe, shared_size=shared, shared_gate=True, shared_name="shared_expert")
    return mla, None if moe is None else replace(moe, dense_layers=())


def variants_json(mla: Mla | None, moe: Moe | None) -> dict[str, Any]:
    """The keys of ``config.json`` that ``parse_variants`` reads."""
    found: dict[str, Any] = {}
    if mla is not None:
        found |= {"kv_lora_rank": mla.kv_lora_rank, "q_lora_rank": mla.q_lora_rank or None,
                  "qk_nope_head_dim": mla.nope_head_dim, "qk_rope_head_dim": mla.rope_head_dim,
                  "v_head_dim": mla.v_head_dim, "rope_interleave": mla.interleaved}
    if moe is None:
        return found
    found |= {"num_experts_per_tok": moe.experts_per_token, "moe_intermediate_size": moe.expert_size,
              "norm_topk_prob": moe.normalise}
    if not moe.bias:
        return {**found, "num_experts": moe.num_experts, "shared_expert_intermediate_size": moe.shared_size}
    return {
        **found, "n_routed_experts": moe.num_experts, "n_shared_experts": moe.shared_size // moe.expert_size,
        "scoring_func": moe.scoring, "topk_method": "noaux_tc", "routed_scaling_factor": moe.scaling,
        "n_group": moe.groups, "topk_group": moe.groups_per_token,
    }
