"""EAGLE-3 heads on disk: SafeAILab's tensor names (see ``headfile.py`` for the form).

    fc, midlayer.*, norm, lm_head; fc_norm.{level} (EAGLE-3.1, named as vLLM does)
    d2t int64 [draft vocabulary] *offsets*: target id = d + d2t[d]; t2d bool [vocabulary]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdspec.spec.eagle3.config import Eagle3Config, head_json, parse_head
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Head(StoredHead):
    """Under SafeAILab's keys."""

    config: Eagle3Config


def random_head(config: Eagle3Config, seed: int, target: TargetIdentity | None = None) -> Head:
    """A head of random weights and vocabulary map, the same for the same seed; its draft ids are ascending."""
    tensors, generator = random_tensors(_shapes(config), seed)
    chosen = random_vocabulary(config.vocab_size, config.draft_vocab_size, generator)
    return Head(config=config, tensors=tensors, target_ids=chosen, target=target)


def save_head(folder: Path, head: Head, *, int8: bool = False) -> None:
    """Writes the two files, each whole or not at all. Raises ConfigError when the folder cannot be written."""
    check_tensors(head.tensors, _shapes(head.config), folder)
    vocabulary = vocabulary_tensors(head.target_ids, head.config.vocab_size)
    write_head(folder, head_json(head.config, head.target, head.card), head.tensors, extra=vocabulary, int8=int8)


def load_head(folder: Path, target_layers: int = 0) -> Head:
    """Reads and checks a head. ``target_layers``: layers of the target, for public heads that do not name the layers
    they fuse. Raises CheckpointError (missing, damaged, misshapen) or ConfigError (a variant that cannot be run)."""
    config, target, card = parse_head(read_head_json(folder), folder, target_layers)
    path = folder / WEIGHTS
    # speculators calls the one layer layers.0
    stored = {name.replace("layers.0.", "midlayer.", 1): tensor for name, tensor in read_tensors(path).items()}
    target_ids = take_target_ids(stored, config.draft_vocab_size, config.vocab_size, path)
    stored.pop("embed_tokens.weight", None)  # a copy of the target's
    tensors = take_tensors(stored, _shapes(config), path)
    refuse_rest(stored, "an EAGLE-3 head", path)
    return Head(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card)


def _shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    return {**config.matrix_shapes(), **config.norm_shapes()}
