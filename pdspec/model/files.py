"""A model's files with everything known of them short of the tensors themselves. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdspec.errors import CheckpointError
from pdspec.model.config import ModelConfig, read_config, read_json, weight_shapes
from pdspec.model.fingerprint import array_tensors_hash, file_tensors_hash
from pdspec.model.hub import DEFAULT_MODEL, Located, locate, tiny_seed
from pdspec.model.tensorfile import TensorEntry, read_header
from pdspec.model.tiny import tiny_config, tiny_tensors
from pdspec.model.tokenizer import load_tokenizer

# MTP modules in a target's checkpoint, which heads.mtp reads: MiMo's, Qwen3-Next's, DeepSeek's
_MTP, _MTP_LAYER = ("model.mtp_layers.", "mtp."), re.compile(r"(model\.layers\.\d+\.)eh_proj\.weight$")
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, kw_only=True)
class ModelFiles(Located):
    """A checked checkpoint. ``content_hash`` covers the tensors as stored, ``tokenizer_hash`` the vocabulary."""

    config: ModelConfig
    content_hash: str
    tokenizer_hash: str


def resolve(model: str = DEFAULT_MODEL, cache_dir: str | Path | None = None) -> ModelFiles:
    """Finds, fetches and checks ``model`` (alias, hub id or folder); reads every weight byte once, for the hash.

    Raises UnknownName, ConfigError (unsupported, cache not writable) or CheckpointError (download, damage).
    """
    where = locate(model, cache_dir)
    tokenizer_hash = load_tokenizer(where).fingerprint()
    if where.path is None:
        config, content_hash = tiny_config(model), array_tensors_hash(tiny_tensors(seed_of(where)))
    else:
        config = read_config(where.path, model)
        content_hash = file_tensors_hash(tensor_entries(where.path, config))
    return ModelFiles(
        name=model, path=where.path, config=config, content_hash=content_hash, tokenizer_hash=tokenizer_hash
    )


def seed_of(where: Located) -> int:
    """The seed of a located tiny model."""
    seed = tiny_seed(where.name)
    if seed is None:
        raise CheckpointError(f"{where.name} has no folder", field="model", remedy="use what resolve() returned")
    return seed


def tensor_entries(folder: Path, config: ModelConfig) -> dict[str, TensorEntry]:
    """Every tensor the model needs, found in the folder's safetensors files and checked for presence, shape, type
    and file length. Raises CheckpointError naming the first wrong key and its file."""
    entries: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        for key, entry in read_header(path).items():
            if key in entries:
                raise _refusal(f"{key} stands in both {entries[key].path.name} and {path.name} of {folder}")
            entries[key] = entry
    return _checked(entries, config, folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index if it has one. Raises CheckpointError."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _refusal(f"{index} has no weight_map")
        paths = [folder / Path(str(name)).name for name in sorted(set(weight_map.values()))]
    elif (folder / "model.safetensors").exists():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise _refusal(f"{folder} lacks {', '.join(missing)}")
    if not paths:
        pickled = sorted(path.name for end in ("*.bin", "*.pt", "*.pth") for path in folder.glob(end))
        also = f" (only {', '.join(pickled)}, which can run code when opened)" if pickled else ""
        raise CheckpointError(
            f"{folder} has no safetensors weights{also}",
            field="model",
            remedy="convert with transformers: model.save_pretrained(folder, safe_serialization=True)",
        )
    return paths


def _checked(entries: Mapping[str, TensorEntry], config: ModelConfig, folder: Path) -> dict[str, TensorEntry]:
    wanted = weight_shapes(config)
    for key, shape in wanted.items():
        entry = entries.get(key)
        if entry is None:
            raise _refusal(f"{folder} lacks the tensor {key}")
        if entry.shape != shape:
            raise _refusal(f"{key} in {entry.path} has shape {list(entry.shape)}, config.json asks for {list(shape)}")
        if entry.dtype not in FLOATS:
            raise _refusal(f"{key} in {entry.path} is {entry.dtype}; only {', '.join(FLOATS)} can be read")
    modules = [found[1] for key in entries if (found := _MTP_LAYER.match(key))]
    for key, entry in entries.items():
        tied_copy = key == "lm_head.weight" and config.tie_embeddings
        drafts = key.startswith((*_MTP, *modules))
        if key not in wanted and not tied_copy and not drafts and not key.endswith("rotary_emb.inv_freq"):
            raise _refusal(f"{key} in {entry.path} has no place in a {config.architecture}")
    return {key: entries[key] for key in wanted}


def _refusal(message: str) -> CheckpointError:
    return CheckpointError(message, field="model", remedy="fetch the checkpoint again or correct its config.json")
