"""MTP modules on disk: DeepSeek-V3's tensor names (see ``headfile.py`` for the form, ``formats.py`` for others'), L the
target's layers, m = 1..N.

    model.layers.{L+m-1}.  enorm, hnorm, eh_proj; input_layernorm, self_attn.*, post_attention_layernorm, mlp.*;
                           shared_head.norm; embed_tokens and shared_head.head, the target's own, may be repeated
    d2t, t2d               a draft vocabulary: some rows of the target's lm_head, for all modules
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

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
from pdspec.spec.mtp.config import FAMILY, MtpConfig, head_json, parse_head
from pdspec.spec.stored import EMBEDDING, read_stored

# What modules share with the target: DeepSeek repeats it in each.
LM_HEAD = "shared_head.head.weight"


@dataclass(frozen=True, kw_only=True, eq=False)
class Head(StoredHead):
    """All modules, under DeepSeek's keys."""

    config: MtpConfig


def random_head(config: MtpConfig, seed: int, target: TargetIdentity | None = None) -> Head:
    """Modules of random weights and vocabulary map, the same for the same seed; draft ids are ascending."""
    tensors, generator = random_tensors(config.shapes(), seed)
    chosen = random_vocabulary(config.vocab_size, config.draft_vocab_size, generator)
    return Head(config=config, tensors=tensors, target_ids=chosen, target=target)


def save_head(folder: Path, head: Head, *, int8: bool = False) -> None:
    """Writes the two files, each whole or not at all; nothing of the target is repeated. Raises ConfigError when the
    folder cannot be written."""
    config = head.config
    check_tensors(head.tensors, config.shapes(), folder)
    reduced = config.draft_vocab_size < config.vocab_size
    extra = vocabulary_tensors(head.target_ids, config.vocab_size) if reduced else {}
    write_head(folder, head_json(config, head.target, head.card), head.tensors, extra=extra, int8=int8)


def load_head(folder: Path) -> Head:
    """Reads and checks all modules. Raises CheckpointError (missing, damaged, misshapen) or ConfigError (a variant that
    cannot be run)."""
    values = read_head_json(folder)
    config, target, card = parse_head(values, folder)
    found = settings(values, FAMILY, folder)
    stored = read_stored(folder, recognise(values, FAMILY, folder), found, config.target_layers)
    target_ids = stored.take_target_ids(config.draft_vocab_size, config.vocab_size)
    shared: dict[str, torch.Tensor] = {}
    for module in range(1, config.num_modules + 1):
        for name in (EMBEDDING, LM_HEAD):
            shared |= stored.take_shared(f"{config.prefix(module)}.{name}", (config.vocab_size, config.hidden_size))
    tensors = stored.take(config.shapes())
    stored.refuse_rest(f"{config.num_modules} MTP modules")
    return Head(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card, shared=shared)
