"""EAGLE-1 heads on disk: SafeAILab's tensor names (see ``headfile.py`` for the form).

    fc (weight and bias), layers.0.*; embed_tokens, a copy of the target's, is dropped
    d2t, t2d   where the head drafts a part of the vocabulary, as EAGLE-3 heads have them; rows of the target's lm_head

A public head may be a ``pytorch_model.bin`` instead.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from pdspec.errors import CheckpointError
from pdspec.spec.eagle1.config import Eagle1Config, head_json, parse_head
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
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity, read_head_json

_PICKLED = "pytorch_model.bin"


@dataclass(frozen=True, kw_only=True, eq=False)
class Head(StoredHead):
    """Under SafeAILab's keys."""

    config: Eagle1Config


def random_head(config: Eagle1Config, seed: int, target: TargetIdentity | None = None) -> Head:
    """A head of random weights and vocabulary map, the same for the same seed; its draft ids are ascending."""
    tensors, generator = random_tensors(config.shapes(), seed)
    chosen = random_vocabulary(config.vocab_size, config.draft_vocab_size, generator)
    return Head(config=config, tensors=tensors, target_ids=chosen, target=target)


def save_head(folder: Path, head: Head, *, int8: bool = False) -> None:
    """Writes the two files, each whole or not at all. Raises ConfigError when the folder cannot be written."""
    check_tensors(head.tensors, head.config.shapes(), folder)
    whole = head.config.draft_vocab_size == head.config.vocab_size
    vocabulary = {} if whole else vocabulary_tensors(head.target_ids, head.config.vocab_size)
    write_head(folder, head_json(head.config, head.target, head.card), head.tensors, extra=vocabulary, int8=int8)


def load_head(folder: Path) -> Head:
    """Reads and checks a head. Raises CheckpointError (missing, damaged, misshapen) or ConfigError (a variant that
    cannot be run)."""
    config, target, card = parse_head(read_head_json(folder), folder)
    path = folder / WEIGHTS
    if not path.exists() and (folder / _PICKLED).exists():
        path = folder / _PICKLED
    stored = _read_pickled(path) if path.name == _PICKLED else read_tensors(path)
    target_ids = take_target_ids(stored, config.draft_vocab_size, config.vocab_size, path)
    stored.pop("embed_tokens.weight", None)
    tensors = take_tensors(stored, config.shapes(), path)
    refuse_rest(stored, "an EAGLE-1 head", path)
    return Head(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card)


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors alone: anything else in the file is refused. Raises CheckpointError naming it."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
            raise TypeError("a mapping of names to tensors is expected")
        return dict(stored)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", field="heads", remedy=HEAD_REMEDY) from error
