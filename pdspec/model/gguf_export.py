"""A checkpoint folder of a Llama decoder → one GGUF file of the same bf16 weights: the way back of ``gguf_convert``.

Matrices stay bf16 bit for bit, norm weights become float32 (llama.cpp wants them so; the values are the same), rows of
q and k are interleaved for llama.cpp's RoPE. No torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.config import ModelConfig, read_json
from pdspec.model.files import ModelFiles, tensor_entries
from pdspec.model.gguf_convert import CONTROL_TOKEN, LAYER_NAMES, TOP_NAMES
from pdspec.model.store import MANIFEST
from pdspec.model.tensorfile import iterate_bytes

NORMAL_TOKEN = 1  # llama.cpp: LLAMA_TOKEN_TYPE_NORMAL
_BF16_FILE = 32  # llama.cpp: LLAMA_FTYPE_MOSTLY_BF16
_TOP = {ours: theirs for theirs, ours in TOP_NAMES.items()}
_LAYER = {ours: theirs for theirs, ours in LAYER_NAMES.items()}


def export(files: ModelFiles, path: Path) -> Path:
    """Write the GGUF file, whole or not at all, and return its path. Raises CheckpointError for a decoder that is no
    plain Llama, or whose tensors are not bf16, or whose tokenizer is not a byte-level BPE."""
    from gguf import GGUFWriter

    folder, config = files.path, files.config
    if folder is None or config.architecture != "LlamaForCausalLM" or config.rope_scaling or config.head_dim % 2:
        raise _refusal(f"{files.name} is no Llama checkpoint with plain RoPE")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    writer = GGUFWriter(fresh, "llama")
    try:
        _describe(writer, config, files.name)
        _add_tokenizer(writer, folder, config)
        for name, values, raw in _tensors(folder, config):
            writer.add_tensor(name, values, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    os.replace(fresh, path)
    return path


def export_folder(files: ModelFiles, folder: Path) -> Path:
    """Copy the checkpoint to a ``folder`` that does not exist yet, for engines that read Hugging Face's form. Raises
    CheckpointError for a model without files, ConfigError for a folder that exists or cannot be written."""
    if files.path is None:
        raise _refusal(f"{files.name} has no files")
    try:
        shutil.copytree(files.path, folder, ignore=shutil.ignore_patterns(MANIFEST))
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error}", field="out", remedy="name a new folder") from error
    return folder


def _describe(writer: Any, config: ModelConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_BF16_FILE)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, folder: Path, config: ModelConfig) -> None:
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE":
        raise _refusal(f"the tokenizer in {folder} is no byte-level BPE")
    special = {int(one["id"]): str(one["content"]) for one in tokenizer["added_tokens"]}
    texts = {int(one): text for text, one in model["vocab"].items()} | special
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(config.vocab_size)])
    writer.add_token_types([CONTROL_TOKEN if index in special else NORMAL_TOKEN for index in range(config.vocab_size)])
    writer.add_token_merges(merges)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    named = {text: one for one, text in special.items()}
    ids = {"bos": config.bos_ids, "eos": config.eos_ids}
    adders = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }  # fmt: skip
    for name, add in adders.items():
        found = [*ids.get(name, ()), *([named[text]] if (text := settings.get(f"{name}_token")) in named else [])]
        if found:
            add(found[0])
    writer.add_add_bos_token(False)
    if isinstance(template := settings.get("chat_template"), str):
        writer.add_chat_template(template)


def _tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[str, np.ndarray, Any]]:
    """(name, values, raw type): float32 vectors as they are, bf16 matrices as bytes [rows, 2 columns]."""
    from gguf import GGMLQuantizationType

    for name, entry, data in iterate_bytes(tensor_entries(folder, config)):
        if entry.dtype != "BF16":
            raise _refusal(f"{name} in {entry.path} is {entry.dtype}, not BF16")
        bits = np.frombuffer(data, np.uint16).reshape(entry.shape)
        if bits.ndim == 1:
            yield _gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32), None
            continue
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads:
            bits = _interleaved(bits, heads)
        yield _gguf_name(name), np.array(bits).view(np.uint8), GGMLQuantizationType.BF16


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}.weight"


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (head, half, pair) → (head, pair, half)."""
    pairs = values.shape[0] // heads // 2
    return values.reshape(heads, 2, pairs, -1).swapaxes(1, 2).reshape(values.shape)


def _refusal(message: str) -> CheckpointError:
    return CheckpointError(message, field="model", remedy="export a bf16 Llama checkpoint, such as smollm2-135m")
