"""Medusa heads on disk, under the names of FasterDecoding/Medusa (see ``headfile.py`` for the form).

    {k}.{j}.linear.{weight,bias}    block j of head k: x + SiLU(W x + b)
    {k}.{number of blocks}.weight   its own output matrix, where it has one
    d2t int64 [draft vocabulary] *offsets*: target id = d + d2t[d]; t2d bool [vocabulary]

Published heads have no map and one output matrix each; some put ``medusa_head.`` before every name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdspec.errors import CheckpointError
from pdspec.spec.headfile import (
    WEIGHTS,
    StoredHead,
    check_tensors,
    random_tensors,
    random_vocabulary,
    read_tensors,
    refuse_rest,
    take_target_ids,
    take_tensors,
    vocabulary_tensors,
    write_head,
)
from pdspec.spec.heads import TargetIdentity, read_head_json
from pdspec.spec.medusa.config import MedusaConfig, head_json, parse_head

_PUBLISHED = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads(StoredHead):
    """Under Medusa's keys."""

    config: MedusaConfig


def random_heads(config: MedusaConfig, seed: int, target: TargetIdentity | None = None) -> Heads:
    """Heads of random weights and vocabulary map, the same for the same seed; biases are around 0."""
    tensors, generator = random_tensors(config.shapes(), seed)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor -= 1.0
    chosen = random_vocabulary(config.vocab_size, config.draft_vocab_size, generator)
    return Heads(config=config, tensors=tensors, target_ids=chosen, target=target)


def save_heads(folder: Path, heads: Heads, *, int8: bool = False) -> None:
    """Writes the two files, each whole or not at all. Raises ConfigError when the folder cannot be written."""
    check_tensors(heads.tensors, heads.config.shapes(), folder)
    vocabulary = vocabulary_tensors(heads.target_ids, heads.config.vocab_size)
    write_head(folder, head_json(heads.config, heads.target, heads.card), heads.tensors, extra=vocabulary, int8=int8)


def load_heads(folder: Path) -> Heads:
    """Reads and checks heads, ours or published ones. Raises CheckpointError (missing, damaged, misshapen, or pickled:
    such a file may run code) or ConfigError (a format of another version)."""
    path = next((folder / name for name in (WEIGHTS, *_PUBLISHED) if (folder / name).exists()), folder / WEIGHTS)
    if path.suffix == ".pt":
        raise CheckpointError(f"{path} is pickled", field="heads",
                              remedy=f"save its tensors as {_PUBLISHED[0]} (safetensors.torch.save_file)")
    stored = {name.removeprefix("medusa_head."): tensor for name, tensor in read_tensors(path).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    config, target, card = parse_head(read_head_json(folder), shapes, folder)
    target_ids = take_target_ids(stored, config.draft_vocab_size, config.vocab_size, path)
    tensors = take_tensors(stored, config.shapes(), path)
    refuse_rest(stored, "Medusa heads", path)
    return Heads(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card)
