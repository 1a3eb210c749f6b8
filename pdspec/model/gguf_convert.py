"""One GGUF file of a Llama decoder → a checkpoint folder: bf16 safetensors, config, tokenizer, chat template.

llama.cpp stores q and k rows interleaved for its RoPE; they go back to Hugging Face's half-split order here
(``convert_hf_to_gguf.py``, ``LlamaModel.permute``). Norm weights are float32 in the file and bf16-exact in the models
this is used for, which ``convert`` checks. No torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from pdspec.errors import CheckpointError
from pdspec.model.tensorfile import to_bfloat16, write_tensors

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # llama.cpp: LLAMA_TOKEN_TYPE_CONTROL
WEIGHTS_FILE = "model.safetensors"


def convert(gguf_path: Path, folder: Path) -> dict[str, np.ndarray]:
    """Writes the checkpoint to ``folder`` (which exists) and returns the tensors (uint16 is bfloat16).

    Raises CheckpointError when the file is damaged, not a Llama or not a byte-level BPE with SmolLM's pre-tokenizer.
    """
    from gguf import GGUFReader  # costs 0.25 s; only a first start pays it

    try:
        reader = GGUFReader(gguf_path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {_hub_name(one.name): _values(one, fields) for one in reader.tensors}
        _write_json(folder / "config.json", _config(fields, tied="lm_head.weight" not in tensors))
        _write_json(folder / "tokenizer.json", _tokenizer(fields), indent=None)
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{gguf_path.name} is damaged or not a Llama GGUF: {error}", field="model", remedy="download it again"
        ) from error
    write_tensors(folder / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
    return tensors


def _hub_name(name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None:
        raise KeyError(name)
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"


def _values(tensor: Any, fields: dict[str, Any]) -> np.ndarray:
    """bf16 bits of one GGUF tensor, [rows, columns] as Hugging Face has it."""
    from gguf.quants import dequantize

    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if ".attn_q." in tensor.name:
        values = _half_split(values, int(fields["llama.attention.head_count"]))
    elif ".attn_k." in tensor.name:
        values = _half_split(values, int(fields["llama.attention.head_count_kv"]))
    bits = to_bfloat16(values)
    if values.ndim == 1 and not np.array_equal((bits.astype(np.uint32) << 16).view(np.float32), values):
        raise ValueError(f"{tensor.name} does not fit bfloat16")
    return bits


def _half_split(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, pair, half) → (head, half, pair)."""
    pairs = values.shape[0] // heads // 2
    return np.ascontiguousarray(values.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(values.shape))


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads, hidden = int(fields["llama.attention.head_count"]), int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": int(fields["llama.block_count"]),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "vocab_size": int(fields["llama.vocab_size"]),
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "tie_word_embeddings": tied,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "torch_dtype": "bfloat16",
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer.json``: byte-level BPE, every digit its own piece, GPT-2's regular expression for the rest."""
    if fields["tokenizer.ggml.model"] != "gpt2" or fields["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"tokenizer {fields['tokenizer.ggml.model']}/{fields['tokenizer.ggml.pre']} is not SmolLM's")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special_token(i, tokens[i]) for i, kind in enumerate(kinds) if kind == CONTROL_TOKEN],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": bpe_model({token: i for i, token in enumerate(tokens)}, fields["tokenizer.ggml.merges"]),
    }


def bpe_model(vocabulary: dict[str, int], merges: list[str]) -> dict[str, Any]:
    """The ``model`` part of a byte-level BPE ``tokenizer.json``."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def special_token(token_id: int, content: str) -> dict[str, Any]:
    """An ``added_tokens`` entry of ``tokenizer.json``."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **flags}


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[int(fields["tokenizer.ggml.bos_token_id"])],
        "eos_token": tokens[int(fields["tokenizer.ggml.eos_token_id"])],
        "unk_token": tokens[int(fields["tokenizer.ggml.unknown_token_id"])],
        "pad_token": tokens[int(fields["tokenizer.ggml.padding_token_id"])],
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(fields["llama.context_length"]),
    }


def _write_json(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent), encoding="utf-8")
