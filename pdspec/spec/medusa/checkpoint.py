"""Medusa heads on disk, under the names of FasterDecoding/Medusa (see ``headfile.py`` for the form).

    {k}.{j}.linear.{weight,bias}    block j of head k: x + SiLU(W x + b)
    {k}.{number of blocks}.weight   its own output matrix, where it has one
    d2t int64 [draft vocabulary] *offsets*: target id = d + d2t[d]; t2d bool [vocabulary]

Published heads have no map and one output matrix each; some put ``medusa_head.`` before every name (``formats.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdspec.spec.formats import recognise, settings
from pdspec.spec.headfile import (
    StoredHead,
    check_tensors,
    random_tensors,
    random_vocabulary,
    vocabulary_tensors,
    write_head,
)
from pdspec.spec.heads import TargetIdentity, read_head_json
from pdspec.spec.medusa.config import FAMILY, MedusaConfig, head_json, parse_head
from pdspec.spec.stored import read_stored


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
    """Reads and checks heads, ours or published ones. Raises CheckpointError (missing, damaged or misshapen) or
    ConfigError (a format of another version)."""
    values = read_head_json(folder)
    stored = read_stored(folder, recognise(values, FAMILY, folder), settings(values, FAMILY, folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    config, target, card = parse_head(values, shapes, stored.where)
    target_ids = stored.take_target_ids(config.draft_vocab_size, config.vocab_size)
    tensors = stored.take(config.shapes())
    stored.refuse_rest("Medusa heads")
    return Heads(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card)
