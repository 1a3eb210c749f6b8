"""MTP modules on disk: DeepSeek-V3's tensor names (see ``headfile.py`` for the form), L the target's layers, m = 1..N.

    model.layers.{L+m-1}.  enorm, hnorm, eh_proj; input_layernorm, self_attn.*, post_attention_layernorm, mlp.*;
                           shared_head.norm; embed_tokens and shared_head.head, the target's own, may be repeated
    d2t, t2d               a draft vocabulary: some rows of the target's lm_head, for all modules
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

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
from pdspec.spec.mtp.config import MtpConfig, head_json, parse_head

# What modules share with the target: DeepSeek repeats it in each.
EMBEDDING, LM_HEAD = "embed_tokens.weight", "shared_head.head.weight"


@dataclass(frozen=True, kw_only=True, eq=False)
class Head(StoredHead):
    """All modules, under DeepSeek's keys. ``shared`` has what the file repeats of the target, as it is stored."""

    config: MtpConfig
    shared: dict[str, torch.Tensor] = field(default_factory=dict)


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
    config, target, card = parse_head(read_head_json(folder), folder)
    path = folder / WEIGHTS
    stored = read_tensors(path)
    target_ids = take_target_ids(stored, config.draft_vocab_size, config.vocab_size, path)
    tensors, shared = take_tensors(stored, config.shapes(), path), {}
    for module in range(1, config.num_modules + 1):
        for name in (EMBEDDING, LM_HEAD):
            key = f"{config.prefix(module)}.{name}"
            if key in stored:
                shared[key] = stored.pop(key)
    check_tensors(shared, dict.fromkeys(shared, (config.vocab_size, config.hidden_size)), path)
    refuse_rest(stored, f"{config.num_modules} MTP modules", path)
    return Head(config=config, tensors=tensors, target_ids=target_ids, target=target, card=card, shared=shared)
