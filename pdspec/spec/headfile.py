"""The tensors of a draft head: how we write them, what they are in memory, and which target they were made for.

A quantised matrix ``X.weight`` is int8 with ``X.weight_scale`` (float32, one per output row); norms stay float32. Every
head family names its tensors and their shapes; ``stored.py`` reads them, ours and others'.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.spec.formats import WEIGHTS
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, torch.Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredHead:
    """A head in memory: ``tensors`` float32 under our names (``formats.py``), ``target_ids`` int64 [draft vocabulary]
    the target id of each draft id. ``target`` is None where the head does not say what it was made for. ``shared`` is
    what the file repeats of the target, as it is stored. ``config`` has ``hidden_size``, ``vocab_size`` and
    ``draft_vocab_size``."""

    config: Any
    tensors: dict[str, torch.Tensor]
    target_ids: torch.Tensor
    target: TargetIdentity | None = None
    card: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, torch.Tensor] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Hash of geometry, vocabulary map and every weight as it is used (after dequantising)."""
        digest = xxhash.xxh3_128(tensors_fingerprint(self.config, self.tensors).encode())
        digest.update(self.target_ids.contiguous().numpy().data)
        for name in sorted(self.shared):
            digest.update(self.shared[name].contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] → int8 [N, K] and float32 scales [N]: symmetric per output row, largest magnitude at ±127."""
    scale = weight.float().abs().amax(dim=1) / 127.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weight.float() / scale[:, None]).to(torch.int8), scale


def dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of what ``quantise`` made."""
    return weight.float() * scale.float()[:, None]


def tensors_fingerprint(geometry: object, tensors: Tensors) -> str:
    """Hash of a geometry and every weight as it is used (after dequantising)."""
    digest = xxhash.xxh3_128(repr(geometry).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def random_tensors(shapes: Shapes, seed: int) -> tuple[dict[str, torch.Tensor], torch.Generator]:
    """Weights that keep their input's variance and norms around 1, the same for the same seed; and the generator that
    made them, for what else a random head needs."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = values / shape[1] ** 0.5 if len(shape) > 1 else 1.0 + 0.1 * values
    return tensors, generator


def write_head(folder: Path, values: Mapping[str, Any], tensors: Tensors, *, extra: Tensors, int8: bool) -> None:
    """Writes ``config.json`` and the tensors, each whole or not at all; matrices as int8 where asked for; ``extra`` as
    it is. Raises ConfigError when the folder cannot be written."""
    stored: dict[str, torch.Tensor] = dict(extra)
    for name, tensor in tensors.items():
        if int8 and tensor.dim() == 2:
            stored[name], stored[f"{name}_scale"] = quantise(tensor)
        else:
            stored[name] = tensor.float().contiguous()
    text = json.dumps(dict(values), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            save_file(stored, Path(temporary) / WEIGHTS, metadata={"format": "pt"})
            (Path(temporary) / "config.json").write_text(text, encoding="utf-8")
            for name in (WEIGHTS, "config.json"):
                os.replace(Path(temporary) / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {folder}: {error}", field="out", remedy="choose another folder") from error


def check_tensors(tensors: Tensors, shapes: Shapes, path: Path) -> None:
    """Raises CheckpointError for the first tensor that is missing, misshapen or not finite."""
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(f"{name} in {path} is {found}, config.json asks for {list(shape)}", field="heads",
                                  remedy=HEAD_REMEDY)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{name} in {path} is not finite", field="heads", remedy=HEAD_REMEDY)


def random_vocabulary(vocab_size: int, draft_vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [draft vocabulary]: target ids drawn without replacement, ascending."""
    return torch.randperm(vocab_size, generator=generator)[:draft_vocab_size].sort().values


def vocabulary_tensors(target_ids: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
    """A reduced vocabulary as heads store it: ``d2t`` int64 [draft vocabulary] *offsets* (target id = d + d2t[d]) and
    ``t2d`` bool [vocabulary]."""
    return {
        "d2t": target_ids - torch.arange(len(target_ids)),
        "t2d": torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, target_ids, True),
    }


def check_target(head: StoredHead, serving: TargetIdentity, where: str, *, strict: bool = False) -> bool:
    """Whether a head was made for the very weights that are ``serving``; if not, warns, or refuses when ``strict``.

    Raises Incompatible for another geometry or tokenizer, naming the field and both values.
    """
    made_for = head.target
    if made_for is None:
        for name, field_ in (("hidden_size", "hidden_size"), ("vocab_size", "vocab_size"),
                             ("num_layers", "target_layers")):  # fmt: skip
            ours = getattr(head.config, field_, serving.geometry[name])
            if ours != serving.geometry[name]:
                raise Incompatible(f"the head in {where} has {name} = {ours}, the target {serving.geometry[name]}",
                                   field=name, remedy="choose the head made for this target, or drafter ngram or none")
        difference = "does not say which target it was made for"
    else:
        made_for.check_serves(serving, where)
        if made_for.content_hash == serving.content_hash:
            return True
        difference = (f"was made for a target of the same geometry with content_hash {made_for.content_hash}, this"
                      f" one has {serving.content_hash}")
    if strict:
        raise Incompatible(f"the head in {where} {difference}", field="content_hash",
                           remedy="choose the head made for this target, or drop strict_target")
    log.warning("the head in %s %s: answers stay the same, acceptance may be lower", where, difference)
    return False
