"""A draft model that ``pdspec train draft-model`` made: layers and final norm under Llama's keys, matrices int8 per
output row. It has the target's width and borrows its embedding and output rows; of the latter those of its draft
vocabulary (``d2t``). The ``pdspec`` section names the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError
from pdspec.model.config import ModelConfig, read_config, weight_shapes
from pdspec.spec.formats import Format
from pdspec.spec.headfile import StoredHead, check_tensors, vocabulary_tensors, write_head
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity, read_head_json, read_section, section
from pdspec.spec.stored import read_stored

NAME = "draft-model"
_BORROWED = ("model.embed_tokens.weight", "lm_head.weight")
_OURS = Format(name="pdspec draft model", family="draft_model", recognised=lambda values: "pdspec" in values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained(StoredHead):
    """Its own tensors by Hugging Face key, as ``own_shapes`` has them."""

    config: ModelConfig
    target: TargetIdentity


def own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of what it does not borrow."""
    return {name: shape for name, shape in weight_shapes(config).items() if name not in _BORROWED}


def is_trained(folder: Path) -> bool:
    """Whether ``folder`` holds such a model, and not a public checkpoint."""
    return _OURS.recognised(read_head_json(folder))


def save_trained(folder: Path, head: StoredHead) -> None:
    """Writes both files, each whole or not at all. Raises ConfigError when the folder cannot be written."""
    config: ModelConfig = head.config
    check_tensors(head.tensors, own_shapes(config), folder)
    values = _values(config, len(head.target_ids), section(head.target, head.card))
    write_head(folder, values, head.tensors, extra=vocabulary_tensors(head.target_ids, config.vocab_size), int8=True)


def load_trained(folder: Path) -> Trained:
    """Checked, float32. Raises CheckpointError and ConfigError."""
    values = read_head_json(folder)
    target, card = read_section(values, folder)
    size = values.get("draft_vocab_size")
    if target is None or not isinstance(size, int):
        raise CheckpointError(f"{folder / 'config.json'} names no {'draft_vocab_size' if target else 'target'}",
                              field="heads.draft_model", remedy=HEAD_REMEDY)
    config = replace(read_config(folder, str(folder)), name=NAME)
    stored = read_stored(folder, _OURS, {})
    target_ids = stored.take_target_ids(size, config.vocab_size)
    tensors = stored.take(own_shapes(config))
    stored.refuse_rest("a draft model")
    return Trained(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card)




def _values(config: ModelConfig, draft_vocab_size: int, ours: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": config.num_layers, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size,
        "draft_vocab_size": draft_vocab_size,
        "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.max_context, "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype, "pdspec": ours,
    }  # fmt: skip
