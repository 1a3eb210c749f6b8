"""A draft model that ``pdspec train draft-model`` made: Llama's keys and ``config.json``, matrices int8 per output row,
no tokenizer of its own. The ``pdspec`` section names the target whose tokens it has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pdspec.errors import CheckpointError
from pdspec.model.config import ModelConfig, read_config, weight_shapes
from pdspec.spec.formats import Format
from pdspec.spec.headfile import Tensors, check_tensors, tensors_fingerprint, write_head
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity, read_head_json, read_section, section
from pdspec.spec.stored import read_stored

_OURS = Format(name="pdspec draft model", family="draft_model", recognised=lambda values: "pdspec" in values)


def is_trained(folder: Path) -> bool:
    """Whether ``folder`` holds such a model, and not a public checkpoint."""
    return _OURS.recognised(read_head_json(folder))


def save_trained(
    folder: Path, config: ModelConfig, tensors: Tensors, target: TargetIdentity | None, card: dict[str, Any]
) -> None:
    """Writes both files, each whole or not at all. Raises ConfigError when the folder cannot be written."""
    check_tensors(tensors, weight_shapes(config), folder)
    write_head(folder, _values(config, section(target, card)), tensors, extra={}, int8=True)


def load_trained(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], TargetIdentity]:
    """Geometry, float32 weights by Hugging Face key, and the target. Raises CheckpointError and ConfigError."""
    target, _ = read_section(read_head_json(folder), folder)
    if target is None:
        raise CheckpointError(f"{folder / 'config.json'} names no target", field="heads.draft_model",
                              remedy=HEAD_REMEDY)
    config = read_config(folder, str(folder))
    stored = read_stored(folder, _OURS, {})
    tensors = stored.take(weight_shapes(config))
    stored.refuse_rest("a Llama")
    return config, tensors, target


def trained_hash(config: ModelConfig, tensors: Tensors) -> str:
    """Of every weight as it is used, and of the geometry wherever it was read."""
    return tensors_fingerprint({name: value for name, value in vars(config).items() if name != "name"}, tensors)


def _values(config: ModelConfig, ours: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.max_context, "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype, "pdspec": ours,
    }  # fmt: skip
