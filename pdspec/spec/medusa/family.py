"""Medusa: which heads serve a target, and the drafter over them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdspec.model.config import ModelConfig
from pdspec.spec.family import Description, Parts, Setting
from pdspec.spec.formats import readable
from pdspec.spec.heads import find_head, random_seed
from pdspec.spec.medusa.config import FAMILY, MedusaConfig
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.medusa.checkpoint import Heads
    from pdspec.spec.medusa.head import MedusaHeads
    from pdspec.spec.protocol import Drafter

_TREE, _TREE_GPU = "chain(2)", "dynamic(3,4,8)"
_RANDOM_DRAFT_VOCABULARY = 4096

DESCRIPTION = Description(
    name="medusa", summary="one head per token ahead on the target's last hidden state; trees are their products",
    needs="heads trained for the target (heads.medusa: FOLDER or random:SEED)",
    ships="first draft tokens with log q, one hidden row", trees=("chain", "static", "dynamic"), default_tree=_TREE,
    default_tree_gpu=_TREE_GPU, source="Cai et al. 2024, Medusa, arXiv 2401.10774",
    formats=readable(FAMILY),
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """No KV of its own. Raises ConfigError where there are no heads."""
    find_head(DESCRIPTION.name, setting.heads, setting.identity)
    return ()


def make(setting: Setting, parts: Parts) -> Drafter:
    """The heads that ``find_head`` names, checked against the target."""
    from pdspec.spec.medusa.drafter import MedusaDrafter

    where = find_head(DESCRIPTION.name, setting.heads, setting.identity)
    heads, matches, model = parts.once(DESCRIPTION.name, where, lambda: _load(where, setting, parts))
    tree = _TREE if parts.ops.device.type == "cpu" else _TREE_GPU
    return MedusaDrafter(heads, model, dtype=setting.dtype, tree=tree, target_matches=matches)


def _load(where: str, setting: Setting, parts: Parts) -> tuple[Heads, bool, MedusaHeads]:
    """The heads as a file, whether they were made for these very weights, and their forward pass."""
    from pdspec.spec.headfile import check_target
    from pdspec.spec.medusa.head import MedusaHeads

    heads = open_heads(where, setting)
    matches = check_target(heads, setting.identity, where, strict=setting.strict)
    return heads, matches, MedusaHeads(heads, ops=parts.ops, lm_head=parts.runner.lm_head, dtype=setting.dtype)


def open_heads(where: str, setting: Setting) -> Heads:
    """The heads that ``find_head`` named. Raises CheckpointError for damaged ones."""
    from pdspec.spec.medusa.checkpoint import load_heads, random_heads

    if (seed := random_seed(where)) is not None:
        return random_heads(_random_config(setting.target.config), seed, setting.identity)
    return load_heads(Path(where))


def _random_config(target: ModelConfig) -> MedusaConfig:
    return MedusaConfig.for_target(target, min(_RANDOM_DRAFT_VOCABULARY, target.vocab_size // 2))
