"""The tiny target's weights as a checkpoint folder: a draft model that may differ from it in one thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pdspec.model.tensorfile import write_tensors
from pdspec.model.tiny import byte_tokenizer, tiny_tensors


def save_tiny(folder: Path, *, vocab_size: int = 272, context: int = 2048, tokenizer: Any = None) -> str:
    """The folder's name; ``vocab_size`` cuts or repeats the rows of embedding and lm_head."""
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": context, "eos_token_id": 257,
    }
    tensors = dict(tiny_tensors(0))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.ascontiguousarray(np.resize(tensors[name], (vocab_size, 64)))
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or byte_tokenizer()))
    return str(folder)
