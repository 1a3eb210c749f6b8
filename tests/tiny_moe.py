"""Tiny seeded checkpoints of decoders with experts or latent attention, written by transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pdspec.model.tiny import BOS, EOS, VOCAB_SIZE, byte_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn", "factor": 32.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.8,
}
DEEPSEEK: dict[str, Any] = {
    **COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "n_shared_experts": 2, "routed_scaling_factor": 2.5, "kv_lora_rank": 32, "q_lora_rank": 48, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "rope_parameters": YARN, "num_nextn_predict_layers": 0,
}
MIXTRAL: dict[str, Any] = {
    **COMMON, "num_hidden_layers": 3, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
}
QWEN3_MOE: dict[str, Any] = {
    **COMMON, "num_hidden_layers": 3, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [1],
}
CLASSES = {
    "deepseek": (DeepseekV3Config, DeepseekV3ForCausalLM, DEEPSEEK),
    "mixtral": (MixtralConfig, MixtralForCausalLM, MIXTRAL),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, QWEN3_MOE),
}


def save_moe(folder: Path, kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Writes a checkpoint in its public format, with the byte tokenizer; the transformers model it was written from."""
    config_class, model_class, values = CLASSES[kind]
    model = model_class(config_class(**{**values, **changes})).eval()
    fill(dict(model.named_parameters()) | dict(model.named_buffers()), seed)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return model


def add_mtp_layer(folder: Path, seed: int = 7) -> dict[str, torch.Tensor]:
    """Puts one MTP module behind the layers of a saved DeepSeek checkpoint, under the public keys (a module's own, with
    copies of what it shares, and a decoder layer like the last); its tensors by key."""
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    stored, last, hidden = load_file(path), config["num_hidden_layers"], config["hidden_size"]
    before, prefix = f"model.layers.{last - 1}.", f"model.layers.{last}."
    module = {key.replace(before, prefix): torch.empty_like(t) for key, t in stored.items() if key.startswith(before)}
    module |= {f"{prefix}{name}.weight": torch.empty(hidden) for name in ("enorm", "hnorm", "shared_head.norm")}
    module[f"{prefix}eh_proj.weight"] = torch.empty(hidden, 2 * hidden)
    fill(module, seed)
    module[f"{prefix}embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
    module[f"{prefix}shared_head.head.weight"] = stored["lm_head.weight"].clone()
    save_file({**stored, **module}, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    return module


def fill(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Random values under which routing, positions and every norm matter; RoPE's tables stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            values = 0.3 * noise
        elif tensor.ndim == 1:
            values = 1.0 + 0.2 * noise
        elif "embed_tokens" in name:
            values = noise
        else:
            gain = 2.0 if any(key in name for key in ("q_", "kv_a", "k_proj", "lm_head", "gate.weight")) else 1.0
            values = gain * tensor.shape[-1] ** -0.5 * noise
        tensor.data.copy_(values)
