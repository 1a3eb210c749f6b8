"""Weights as torch tensors.

files = resolve("smollm2-135m"); weights = load_weights(files, "bfloat16")
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.files import ModelFiles, resolve, seed_of, tensor_entries
from pdspec.model.tiny import tiny_tensors

__all__ = ["ModelFiles", "load_weights", "resolve", "torch_dtype"]


def torch_dtype(name: str) -> torch.dtype:
    """``bfloat16`` or ``float32``. Raises ConfigError on anything else."""
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in known:
        raise ConfigError(f"unknown dtype {name!r}", field="dtype", remedy="choose " + " or ".join(known))
    return known[name]


def load_weights(files: ModelFiles, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """Every tensor of ``files`` on the CPU as ``dtype``, by Hugging Face key; ``lm_head.weight`` only if untied. The
    bias that corrects experts' scores stays as it is stored: rounded, it would choose other experts.

    Tensors stored as ``dtype`` are mapped from the file, not copied: do not write to them. Raises CheckpointError
    naming the key and file that is missing, misshapen or cut.
    """
    wanted = torch_dtype(dtype)
    if files.path is None:
        arrays = tiny_tensors(seed_of(files))
        return {key: torch.from_numpy(bits).view(torch.bfloat16).to(wanted) for key, bits in arrays.items()}
    entries = tensor_entries(files.path, files.config)
    weights: dict[str, torch.Tensor] = {}
    for path in sorted({entry.path for entry in entries.values()}):
        try:
            with safe_open(path, framework="pt") as file:
                for key in (key for key, entry in entries.items() if entry.path == path):
                    tensor = file.get_tensor(key)
                    weights[key] = tensor if key.endswith("e_score_correction_bias") else tensor.to(wanted)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: {error}", field="model", remedy="fetch it again") from error
    return {key: weights[key] for key in entries}
