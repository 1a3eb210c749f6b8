"""MTP modules as they are published: within a target's checkpoint, or speculators' of their own. See
``published_heads.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import published_equations as eq
import torch
from published_heads import (
    EMBEDDING,
    EPS,
    HEADS,
    LAYERS,
    LLAMA,
    PLAIN,
    D,
    H,
    Published,
    attention_shapes,
    made,
    mlp_shapes,
    speculators,
    target_weight,
    values,
)

EXPERTS, CHOSEN, SMALL = 8, 3, 32
# published name of each norm of the equations
OWN = {"token": "token_layernorm", "hidden": "hidden_layernorm", "final": "final_layernorm", "input": "input_layernorm",
       "post": "post_attention_layernorm"}  # fmt: skip
MTP_QWEN = {"token": "pre_fc_norm_embedding", "hidden": "pre_fc_norm_hidden", "final": "norm",
            "input": "layers.0.input_layernorm", "post": "layers.0.post_attention_layernorm"}  # fmt: skip
DEEPSEEK = {"token": "enorm", "hidden": "hnorm", "final": "shared_head.norm", "input": "input_layernorm",
            "post": "post_attention_layernorm"}  # fmt: skip


def module(
    weights: Mapping[str, torch.Tensor], prefix: str, norms: Mapping[str, str], projection: str,
    attend: Callable[[torch.Tensor], torch.Tensor], mlp: Callable[[torch.Tensor], torch.Tensor], *,
    centre: float = 0.0, hidden_first: bool = False,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    w = eq.reader(weights, prefix)
    read = {name: w(f"{key}.weight") + centre for name, key in norms.items()}
    return lambda e, h: eq.mtp(e, h, read, w(f"{projection}.weight"), attend, mlp, EPS, hidden_first=hidden_first)


def norm_shapes(prefix: str, norms: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{key}.weight": (H,) for key in norms.values()}


def plain_module(weights: Mapping[str, torch.Tensor], prefix: str, *, hidden_first: bool, **known: Any):
    attend = eq.reader(weights, f"{prefix}self_attn.")
    return module(weights, prefix, OWN, "input_proj", lambda x: eq.attention(x, attend, {**PLAIN, **known}),
                  lambda x: eq.swiglu(x, eq.reader(weights, f"{prefix}mlp.")), hidden_first=hidden_first)


def mimo() -> Published:
    """XiaomiMiMo/MiMo: Qwen2's layer, the hidden state before the embedding; two modules, as its config has them."""
    weights = made({
        name: shape for m in range(2) for prefix in (f"model.mtp_layers.{m}.",)
        for name, shape in {**norm_shapes(prefix, OWN), f"{prefix}input_proj.weight": (H, 2 * H),
                            **attention_shapes(f"{prefix}self_attn.", bias=True), **mlp_shapes(f"{prefix}mlp.")}.items()
    })  # fmt: skip
    config = {
        **LLAMA, "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "head_dim": D, "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 2, "attention_bias": True, "rope_theta": 640000, "sliding_window": 32768,
        "use_sliding_window": False, "use_mrope": False, "max_window_layers": 32, "tie_word_embeddings": False,
    }  # fmt: skip
    series = [plain_module(weights, f"model.mtp_layers.{m}.", hidden_first=True, bias=True, theta=640000.0)
              for m in range(2)]  # fmt: skip
    return Published(family="mtp", config=config, weights=weights, hidden=series[0], inside=True)


def speculators_qwen3() -> Published:
    prefix = "mtp_layers.0."
    weights = made({
        **norm_shapes(prefix, OWN), f"{prefix}input_proj.weight": (H, 2 * H),
        **attention_shapes(f"{prefix}self_attn.", norms=True), **mlp_shapes(f"{prefix}mlp."),
    })
    config = speculators("mtp", "MTPDraftModel", {"model_type": "qwen3", "num_hidden_layers": LAYERS},
                         num_nextn_predict_layers=1)
    return Published(family="mtp", config=config, weights=weights,
                     hidden=plain_module(weights, prefix, hidden_first=False, norms=True))


QWEN_NEXT: dict[str, Any] = {
    **LLAMA, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": LAYERS,
    "head_dim": D, "attention_bias": False, "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_scaling": None,
    "decoder_sparse_step": 1, "full_attention_interval": 4, "mlp_only_layers": [], "num_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN, "moe_intermediate_size": SMALL, "shared_expert_intermediate_size": SMALL,
    "norm_topk_prob": True, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "use_sliding_window": False,
}  # fmt: skip
GATED = {**PLAIN, "gated": True, "norms": True, "turned": D // 4, "theta": 1e7}


def router_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}gate.weight": (EXPERTS, H), f"{prefix}shared_expert_gate.weight": (1, H),
            **mlp_shapes(f"{prefix}shared_expert.", SMALL)}  # fmt: skip


def zero_centred(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: tensor - (1.0 if tensor.dim() == 1 else 0.0) for name, tensor in made(shapes).items()}


def qwen_next() -> Published:
    """Qwen3-Next-80B-A3B: ``mtp.*`` in the target's checkpoint, experts one by one."""
    layer, mlp = "mtp.layers.0.", "mtp.layers.0.mlp."
    weights = zero_centred({
        **norm_shapes("mtp.", MTP_QWEN), "mtp.fc.weight": (H, 2 * H), **router_shapes(mlp),
        **attention_shapes(f"{layer}self_attn.", norms=True, gated=True),
        **{name: shape for e in range(EXPERTS) for name, shape in mlp_shapes(f"{mlp}experts.{e}.", SMALL).items()},
    })
    attend, w = eq.reader(weights, f"{layer}self_attn."), eq.reader(weights, mlp)
    hidden = module(
        weights, "mtp.", MTP_QWEN, "fc", lambda x: eq.attention(x, attend, GATED),
        lambda x: eq.qwen_experts(x, w, lambda e: eq.reader(weights, f"{mlp}experts.{e}."), CHOSEN, EXPERTS),
        centre=1.0,
    )
    return Published(family="mtp", config=QWEN_NEXT, weights=weights, hidden=hidden, inside=True)


def qwen_3_5() -> Published:
    """Qwen3.5's dense models: the text's config is inside, M-RoPE, no experts."""
    layer = "mtp.layers.0."
    weights = zero_centred({
        **norm_shapes("mtp.", MTP_QWEN), "mtp.fc.weight": (H, 2 * H), **mlp_shapes(f"{layer}mlp."),
        **attention_shapes(f"{layer}self_attn.", norms=True, gated=True),
    })
    text = {
        **LLAMA, "model_type": "qwen3_5_text", "num_hidden_layers": LAYERS, "head_dim": D, "attn_output_gate": True,
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "attention_bias": False,
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25,
                            "rope_theta": 10000000, "rope_type": "default"},
    }  # fmt: skip
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text,
              "tie_word_embeddings": False, "vision_config": {"hidden_size": 32, "depth": 2}}  # fmt: skip
    attend = eq.reader(weights, f"{layer}self_attn.")
    hidden = module(weights, "mtp.", MTP_QWEN, "fc", lambda x: eq.attention(x, attend, GATED),
                    lambda x: eq.swiglu(x, eq.reader(weights, f"{layer}mlp.")), centre=1.0)
    return Published(family="mtp", config=config, weights=weights, hidden=hidden, inside=True)


def speculators_qwen_next() -> Published:
    """speculators' converter: the modules alone, experts packed in two tensors."""
    prefix, mlp = "mtp_layers.0.", "mtp_layers.0.mlp."
    weights = zero_centred({
        **norm_shapes(prefix, OWN), f"{prefix}input_proj.weight": (H, 2 * H), **router_shapes(mlp),
        **attention_shapes(f"{prefix}self_attn.", norms=True, gated=True),
    })
    weights[f"{mlp}experts.gate_up_proj"] = values("gate_up_proj", EXPERTS, 2 * SMALL, H)
    weights[f"{mlp}experts.down_proj"] = values("down_proj", EXPERTS, H, SMALL)

    def expert(e: int) -> eq.Read:
        gate_up = weights[f"{mlp}experts.gate_up_proj"][e].double()
        parts = {"gate_proj.weight": gate_up[:SMALL], "up_proj.weight": gate_up[SMALL:],
                 "down_proj.weight": weights[f"{mlp}experts.down_proj"][e].double()}  # fmt: skip
        return parts.__getitem__

    attend, w = eq.reader(weights, f"{prefix}self_attn."), eq.reader(weights, mlp)
    hidden = module(weights, prefix, OWN, "input_proj", lambda x: eq.attention(x, attend, GATED),
                    lambda x: eq.qwen_experts(x, w, expert, CHOSEN, EXPERTS), centre=1.0)
    inside = {key: value for key, value in QWEN_NEXT.items() if key not in LLAMA or QWEN_NEXT[key] != LLAMA[key]}
    config = speculators("mtp", "MTPDraftModel", inside, num_nextn_predict_layers=1)
    return Published(family="mtp", config=config, weights=weights, hidden=hidden)


def deepseek() -> Published:
    """DeepSeek-V3: layer L of the target's checkpoint, latent attention, routed and shared experts, YaRN; embedding and
    output head repeated."""
    rule = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    config: dict[str, Any] = {
        **LLAMA, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 1, "num_key_value_heads": HEADS, "q_lora_rank": 48, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": EXPERTS, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": SMALL, "n_shared_experts": 2,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "first_k_dense_replace": 3, "moe_layer_freq": 1, "rope_theta": 10000, "rope_scaling": rule, "ep_size": 1,
        "attention_bias": False,
    }  # fmt: skip
    prefix = f"model.layers.{LAYERS}."
    attention = f"{prefix}self_attn."
    weights = made({
        **norm_shapes(prefix, DEEPSEEK), f"{prefix}eh_proj.weight": (H, 2 * H), f"{attention}q_a_proj.weight": (48, H),
        f"{attention}q_a_layernorm.weight": (48,), f"{attention}q_b_proj.weight": (HEADS * 48, 48),
        f"{attention}kv_a_proj_with_mqa.weight": (32 + 16, H), f"{attention}kv_a_layernorm.weight": (32,),
        f"{attention}kv_b_proj.weight": (HEADS * 64, 32), f"{attention}o_proj.weight": (H, HEADS * 32),
        f"{prefix}mlp.gate.weight": (EXPERTS, H), f"{prefix}mlp.gate.e_score_correction_bias": (EXPERTS,),
        **{name: shape for e in range(EXPERTS)
           for name, shape in mlp_shapes(f"{prefix}mlp.experts.{e}.", SMALL).items()},
        **mlp_shapes(f"{prefix}mlp.shared_experts.", 2 * SMALL),
    })  # fmt: skip
    weights |= {f"{prefix}embed_tokens.weight": EMBEDDING.clone(),
                f"{prefix}shared_head.head.weight": target_weight("lm_head.weight")}  # fmt: skip
    known = {**PLAIN, **config, "heads": HEADS}
    hidden = module(
        weights, prefix, DEEPSEEK, "eh_proj",
        lambda x: eq.latent_attention(x, eq.reader(weights, attention), known),
        lambda x: eq.deepseek_experts(x, eq.reader(weights, f"{prefix}mlp."), config),
    )
    return Published(family="mtp", config=config, weights=weights, hidden=hidden, inside=True)


MTPS = {
    "MiMo": mimo(), "speculators mtp of Qwen3": speculators_qwen3(), "Qwen3-Next": qwen_next(), "Qwen3.5": qwen_3_5(),
    "speculators mtp of Qwen3-Next": speculators_qwen_next(), "DeepSeek-V3": deepseek(),
}  # fmt: skip
