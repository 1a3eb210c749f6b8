"""EAGLE-1 heads on disk: SafeAILab's tensor names (see ``headfile.py`` for the form, ``formats.py`` for others').

fc (weight and bias), layers.0.*; embed_tokens may be repeated
d2t, t2d   where the head drafts a part of the vocabulary, as EAGLE-3 heads have them; rows of the target's lm_head
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdspec.spec.eagle1.config import FAMILY, Eagle1Config, head_json, parse_head
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
from pdspec.spec.stored import EMBEDDING, read_stored


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
    values = read_head_json(folder)
    config, target, card = parse_head(values, folder)
    stored = read_stored(folder, recognise(values, FAMILY, folder), settings(values, FAMILY, folder))
    target_ids = stored.take_target_ids(config.draft_vocab_size, config.vocab_size)
    shared = stored.take_shared(EMBEDDING, (config.vocab_size, config.hidden_size))
    tensors = stored.take(config.shapes())
    stored.refuse_rest("an EAGLE-1 head")
    return Head(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card, shared=shared)
