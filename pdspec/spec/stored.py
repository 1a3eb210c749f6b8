"""Reading a head's tensors in any of the table's formats (``formats.py``), always checked before use.

What is missing, misshapen, not finite or left over is refused under the name that it has in the file, with the file. Of
a target's checkpoint only the modules' tensors are read, and of a sharded one only the files that hold them. Pickled
files (``.pt``, ``.bin``) give tensors and nothing else: torch's ``weights_only`` runs none of their code.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pdspec.errors import CheckpointError
from pdspec.model.config import read_json
from pdspec.spec.formats import WEIGHTS, Format
from pdspec.spec.headfile import Shapes, dequantise
from pdspec.spec.heads import HEAD_REMEDY

_INDEX = WEIGHTS + ".index.json"
EMBEDDING = "embed_tokens.weight"  # a copy of the target's, in EAGLE heads


@dataclass(kw_only=True)
class Stored:
    """Tensors under our names, to be taken one by one. ``found`` says under which key, in which file, each stood;
    ``first`` is the number of the target's layers where modules are counted after them."""

    row: Format
    where: Path
    first: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    found: dict[str, tuple[str, Path]] = field(default_factory=dict)

    def put(self, key: str, tensor: torch.Tensor, path: Path) -> None:
        """A tensor as the file has it. Raises CheckpointError for a second one of the same name."""
        name = self.row.ours(key, self.first)
        if name in self.tensors:
            raise CheckpointError(f"{self.label(name)} and {key} in {path} are the same tensor", field="heads",
                                  remedy=HEAD_REMEDY)
        self.tensors[name], self.found[name] = tensor, (key, path)

    def key(self, name: str) -> str:
        """What one of our names is called in the file, or would be."""
        if name in self.found:
            return self.found[name][0]
        dropped = [theirs for theirs, ours in self.row.renames if not ours]
        keys = [key for key, _ in self.found.values()]
        before = next((prefix for prefix in dropped if any(key.startswith(prefix) for key in keys)), "")
        return before + self.row.theirs(name, self.first)

    def label(self, name: str) -> str:
        """``KEY in FILE``."""
        return f"{self.key(name)} in {self.found[name][1] if name in self.found else self.where}"

    def pop(self, name: str) -> torch.Tensor | None:
        """Out of here, or None."""
        return self.tensors.pop(name, None)

    def take(self, shapes: Shapes) -> dict[str, torch.Tensor]:
        """The tensors of ``shapes``, float32. Raises CheckpointError for the first that is missing or wrong."""
        return {name: self._take(name, shape) for name, shape in shapes.items()}

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        label, tensor, scale = self.label(name), self.pop(name), self.pop(f"{name}_scale")
        if tensor is None:
            raise CheckpointError(f"{self.where} lacks the tensor {self.key(name)}", field="heads",
                                  remedy=HEAD_REMEDY)
        if scale is not None and (tensor.dtype != torch.int8 or scale.shape != tensor.shape[:1]):
            raise CheckpointError(f"{label} does not fit its scales", field="heads", remedy=HEAD_REMEDY)
        if scale is None and not tensor.is_floating_point():
            raise CheckpointError(f"{label} is {tensor.dtype} without scales", field="heads", remedy=HEAD_REMEDY)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{label} is {list(tensor.shape)}, config.json asks for {list(shape)}", field="heads",
                                  remedy=HEAD_REMEDY)
        values = tensor.float() if scale is None else dequantise(tensor, scale)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{label} is not finite", field="heads", remedy=HEAD_REMEDY)
        return values

    def take_shared(self, name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Something of the target's that the file repeats, as it is stored, by its key there; empty where it does not.
        Raises CheckpointError for another shape."""
        tensor = self.pop(name)
        if tensor is None:
            return {}
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.label(name)} is {list(tensor.shape)}, config.json asks for {list(shape)}",
                                  field="heads", remedy=HEAD_REMEDY)
        return {self.key(name): tensor}

    def take_target_ids(self, draft_vocab_size: int, vocab_size: int) -> torch.Tensor:
        """int64 [draft vocabulary]: the distinct target id of each draft id, out of ``d2t`` (*offsets*) and ``t2d``.
        Raises CheckpointError for a map that is none."""
        offsets, mask, path = self.pop("d2t"), self.pop("t2d"), self.where
        if offsets is None and draft_vocab_size == vocab_size:
            return torch.arange(vocab_size)
        if offsets is None or offsets.shape != (draft_vocab_size,) or offsets.is_floating_point():
            raise CheckpointError(f"{path} has no d2t of {draft_vocab_size} whole numbers", field="heads",
                                  remedy=HEAD_REMEDY)
        ids = torch.arange(draft_vocab_size) + offsets.long()
        outside = int(ids.min()) < 0 or int(ids.max()) >= vocab_size
        if outside or len(ids.unique()) != len(ids):
            raise CheckpointError(f"d2t in {path} names target ids twice or outside the vocabulary", field="heads",
                                  remedy=HEAD_REMEDY)
        chosen = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids, True)
        if mask is not None and not torch.equal(mask.bool(), chosen):
            raise CheckpointError(f"t2d and d2t in {path} contradict one another", field="heads", remedy=HEAD_REMEDY)
        return ids

    def refuse_rest(self, what: str) -> None:
        """Raises CheckpointError for the first tensor that nobody took; ``what`` has no place for it."""
        if self.tensors:
            raise CheckpointError(f"{self.label(sorted(self.tensors)[0])} has no place in {what}", field="heads",
                                  remedy=HEAD_REMEDY)


def read_stored(folder: Path, row: Format, settings: Mapping[str, Any], first: int = 0) -> Stored:
    """The tensors of a head, as ``row`` names and orders them and with the ``settings`` that it makes of config.json.
    Raises CheckpointError naming a file that is absent, damaged or holds more than tensors."""
    files = _files(folder, row)
    whole = len(files) == 1
    stored = Stored(row=row, where=folder / (next(iter(files)) if whole else _INDEX), first=first)
    for name, keys in files.items():
        path = folder / name
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickled
        for key, tensor in read(path, row, first, keys).items():
            stored.put(key, tensor, path)
    _split_experts(stored)
    for name, tensor in stored.tensors.items():
        if row.hidden_first and name.endswith("eh_proj.weight") and tensor.dim() == 2:
            stored.tensors[name] = torch.cat(tensor.tensor_split(2, dim=1)[::-1], 1)
        if settings.get("zero_centred_norms") and name.endswith("norm.weight") and tensor.is_floating_point():
            stored.tensors[name] = 1.0 + tensor.float()
    return stored


def _files(folder: Path, row: Format) -> dict[str, list[str] | None]:
    """Files to read, and which keys of each: None where all that ``row`` takes."""
    index = folder / _INDEX
    if WEIGHTS in row.files and index.exists() and not (folder / WEIGHTS).exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map", field="heads", remedy=HEAD_REMEDY)
        return {name: [key for key in sorted(weight_map) if weight_map[key] == name]
                for name in sorted(set(weight_map.values()))}  # fmt: skip
    for name in row.files:
        if (folder / name).exists():
            return {name: None}
    raise CheckpointError(f"{folder} has none of {', '.join(row.files)}", field="heads", remedy=HEAD_REMEDY)


def _read_safetensors(path: Path, row: Format, first: int, keys: list[str] | None) -> dict[str, torch.Tensor]:
    wanted = None if keys is None else [key for key in keys if row.takes(key, first)]
    if wanted == []:
        return {}  # a shard of the target's
    try:
        with safe_open(path, framework="pt") as file:
            chosen = [key for key in file.keys() if row.takes(key, first)] if wanted is None else wanted  # noqa: SIM118
            return {key: file.get_tensor(key) for key in chosen}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", field="heads", remedy=HEAD_REMEDY) from error


def _read_pickled(path: Path, row: Format, first: int, _keys: list[str] | None) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise TypeError("a mapping of names to tensors is expected")
    except pickle.UnpicklingError as error:  # whose text tells to run the file's code
        raise CheckpointError(f"cannot read {path}: it holds more than tensors, or is damaged", field="heads",
                              remedy=HEAD_REMEDY) from error
    except (OSError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", field="heads", remedy=HEAD_REMEDY) from error
    return {key: tensor for key, tensor in found.items() if row.takes(key, first)}


def _split_experts(stored: Stored) -> None:
    """Experts in one tensor [E, 2 I, H] and one [E, H, I], as transformers packs them, one by one."""
    for name in [name for name in stored.tensors if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name)]:
        prefix, kind = name.rsplit(".", 1)
        key, path = stored.found[name]
        for expert, matrix in enumerate(stored.tensors.pop(name)):
            parts = matrix.tensor_split(2) if kind == "gate_up_proj" else (matrix,)
            for part, tensor in zip(("gate_proj", "up_proj") if len(parts) == 2 else (kind,), parts, strict=True):
                stored.tensors[f"{prefix}.{expert}.{part}.weight"] = tensor
                stored.found[f"{prefix}.{expert}.{part}.weight"] = (key, path)
