"""Heads on disk: SafeAILab's tensor names, optionally with int8 matrices, always checked before use.

    config.json          geometry, and under "pdspec" the target's hashes and the training card
    model.safetensors    fc, midlayer.*, norm, lm_head; d2t int64 [draft vocabulary] *offsets*: target id = d + d2t[d];
                         t2d bool [vocabulary]

A quantised matrix ``X.weight`` is int8 with ``X.weight_scale`` (float32, one per output row); norms stay float32.
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
from safetensors.torch import load_file, save_file

from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.spec.eagle3.config import Eagle3Config, TargetIdentity, head_json, parse_head, read_head_json

WEIGHTS = "model.safetensors"
_REMEDY = "fetch or train the head again"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """A head in memory: ``tensors`` float32 under SafeAILab's keys, ``target_ids`` int64 [draft vocabulary] the target
    id of each draft id. ``target`` is None where the head does not say what it was made for."""

    config: Eagle3Config
    tensors: dict[str, torch.Tensor]
    target_ids: torch.Tensor
    target: TargetIdentity | None = None
    card: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Hash of geometry, vocabulary map and every weight as it is used (after dequantising)."""
        digest = xxhash.xxh3_128(repr(self.config).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().numpy().data)
        digest.update(self.target_ids.contiguous().numpy().data)
        return digest.hexdigest()


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] → int8 [N, K] and float32 scales [N]: symmetric per output row, largest magnitude at ±127."""
    scale = weight.float().abs().amax(dim=1) / 127.0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weight.float() / scale[:, None]).to(torch.int8), scale


def dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of what ``quantise`` made."""
    return weight.float() * scale.float()[:, None]


def random_head(config: Eagle3Config, seed: int, target: TargetIdentity | None = None) -> Head:
    """A head of random weights and vocabulary map, the same for the same seed; its draft ids are ascending."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {name: normal(*shape) / shape[1] ** 0.5 for name, shape in config.matrix_shapes().items()}
    tensors |= {name: 1.0 + 0.1 * normal(*shape) for name, shape in config.norm_shapes().items()}
    chosen = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size]
    return Head(config=config, tensors=tensors, target_ids=chosen.sort().values, target=target)


def save_head(folder: Path, head: Head, *, int8: bool = False) -> None:
    """Writes the two files, each whole or not at all. Raises ConfigError when the folder cannot be written."""
    _check_tensors(head.config, head.tensors, folder)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in head.tensors.items():
        if int8 and tensor.dim() == 2:
            stored[name], stored[f"{name}_scale"] = quantise(tensor)
        else:
            stored[name] = tensor.float().contiguous()
    stored["d2t"] = head.target_ids - torch.arange(len(head.target_ids))
    stored["t2d"] = torch.zeros(head.config.vocab_size, dtype=torch.bool).index_fill(0, head.target_ids, True)
    text = json.dumps(head_json(head.config, head.target, head.card), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            save_file(stored, Path(temporary) / WEIGHTS, metadata={"format": "pt"})
            (Path(temporary) / "config.json").write_text(text, encoding="utf-8")
            for name in (WEIGHTS, "config.json"):
                os.replace(Path(temporary) / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {folder}: {error}", field="out", remedy="choose another folder") from error


def load_head(folder: Path, target_layers: int = 0) -> Head:
    """Reads and checks a head. ``target_layers``: layers of the target, for public heads that do not name the layers
    they fuse. Raises CheckpointError (missing, damaged, misshapen) or ConfigError (a variant that cannot be run)."""
    config, target, card = parse_head(read_head_json(folder), folder, target_layers)
    path = folder / WEIGHTS
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", field="heads", remedy=_REMEDY) from error
    # speculators calls the one layer layers.0
    stored = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in stored.items()}
    target_ids = _target_ids(config, stored.pop("d2t", None), stored.pop("t2d", None), path)
    stored.pop("embed_tokens.weight", None)  # a copy of the target's
    tensors: dict[str, torch.Tensor] = {}
    for name in [*config.matrix_shapes(), *config.norm_shapes()]:
        if name not in stored:
            raise CheckpointError(f"{path} lacks the tensor {name}", field="heads", remedy=_REMEDY)
        tensor, scale = stored.pop(name), stored.pop(f"{name}_scale", None)
        if scale is not None and (tensor.dtype != torch.int8 or scale.shape != tensor.shape[:1]):
            raise CheckpointError(f"{name} in {path} does not fit its scales", field="heads", remedy=_REMEDY)
        if scale is None and not tensor.is_floating_point():
            raise CheckpointError(f"{name} in {path} is {tensor.dtype} without scales", field="heads", remedy=_REMEDY)
        tensors[name] = tensor.float() if scale is None else dequantise(tensor, scale)
    if stored:
        raise CheckpointError(f"{sorted(stored)[0]} in {path} has no place in an EAGLE-3 head", field="heads",
                              remedy=_REMEDY)
    _check_tensors(config, tensors, path)
    return Head(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card)


def check_target(head: Head, serving: TargetIdentity, where: str, *, strict: bool = False) -> bool:
    """Whether the head was made for the very weights that are ``serving``; if not, warns, or refuses when ``strict``.

    Raises Incompatible for another geometry or tokenizer, naming the field and both values.
    """
    if head.target is None:
        for name in ("hidden_size", "vocab_size"):
            ours, theirs = getattr(head.config, name), serving.geometry[name]
            if ours != theirs:
                raise Incompatible(f"the head in {where} has {name} = {ours}, the target {theirs}", field=name,
                                   remedy="choose the head made for this target, or drafter ngram or none")
        difference = "does not say which target it was made for"
    else:
        head.target.check_serves(serving, where)
        if head.target.content_hash == serving.content_hash:
            return True
        difference = (f"was made for a target of the same geometry with content_hash {head.target.content_hash}, this"
                      f" one has {serving.content_hash}")
    if strict:
        raise Incompatible(f"the head in {where} {difference}", field="content_hash",
                           remedy="choose the head made for this target, or drop strict_target")
    log.warning("the head in %s %s: answers stay the same, acceptance may be lower", where, difference)
    return False


def _target_ids(
    config: Eagle3Config, offsets: torch.Tensor | None, mask: torch.Tensor | None, path: Path
) -> torch.Tensor:
    """int64 [draft vocabulary]: distinct target ids. Raises CheckpointError for a map that is none."""
    if offsets is None and config.draft_vocab_size == config.vocab_size:
        return torch.arange(config.vocab_size)
    if offsets is None or offsets.shape != (config.draft_vocab_size,) or offsets.is_floating_point():
        raise CheckpointError(f"{path} has no d2t of {config.draft_vocab_size} whole numbers", field="heads",
                              remedy=_REMEDY)
    ids = torch.arange(config.draft_vocab_size) + offsets.long()
    outside = int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size
    if outside or len(ids.unique()) != len(ids):
        raise CheckpointError(f"d2t in {path} names target ids twice or outside the vocabulary", field="heads",
                              remedy=_REMEDY)
    chosen = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    if mask is not None and not torch.equal(mask, chosen):
        raise CheckpointError(f"t2d and d2t in {path} contradict one another", field="heads", remedy=_REMEDY)
    return ids


def _check_tensors(config: Eagle3Config, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, shape in {**config.matrix_shapes(), **config.norm_shapes()}.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise CheckpointError(f"{name} in {path} is {found}, config.json asks for {list(shape)}", field="heads",
                                  remedy=_REMEDY)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{name} in {path} is not finite", field="heads", remedy=_REMEDY)
