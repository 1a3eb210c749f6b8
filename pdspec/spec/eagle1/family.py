"""EAGLE-1: which head serves a target, and the drafter over it. EAGLE-2 is the same with other trees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdspec.model.config import ModelConfig
from pdspec.spec.eagle1.config import FAMILY, Eagle1Config, parse_head
from pdspec.spec.family import Description, Parts, Setting
from pdspec.spec.formats import readable
from pdspec.spec.heads import find_head, random_seed, read_head_json
from pdspec.spec.options import FEATURE_OPTIONS, flag
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.eagle1.checkpoint import Head
    from pdspec.spec.eagle1.head import Eagle1Head
    from pdspec.spec.protocol import Drafter

_RANDOM_DRAFT_VOCABULARY = 4096

DESCRIPTION = Description(
    name="eagle1", summary="one decoder layer over the target's last hidden states and the next token",
    needs="a head trained for the target (heads.eagle1: FOLDER or random:SEED)",
    ships="draft KV of the prompt, first draft tokens with log q, one hidden row",
    trees=("chain", "static", "dynamic"), default_tree="chain(2)", default_tree_gpu="static(mc_sim_7b_63)",
    source="Li et al. 2024, EAGLE, arXiv 2401.15077", options=FEATURE_OPTIONS,
    formats=readable(FAMILY),
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """One layer."""
    return layer_groups(DESCRIPTION, find_head(DESCRIPTION.name, setting.heads, setting.identity), setting)


def make(setting: Setting, parts: Parts) -> Drafter:
    """The head that ``find_head`` names, checked against the target."""
    where = find_head(DESCRIPTION.name, setting.heads, setting.identity)
    return make_drafter(DESCRIPTION, where, setting, parts)


def layer_groups(family: Description, where: str, setting: Setting) -> tuple[CacheGroup, ...]:
    """The cache group of the head at ``where`` (a folder or ``random:SEED``), under the name of ``family``."""
    if random_seed(where) is not None:
        config = _random_config(setting.target.config)
    else:
        config, _, _ = parse_head(read_head_json(Path(where)), Path(where))
    return (config.layer_group(group_name(family), setting.dtype),)


def make_drafter(
    family: Description, where: str, setting: Setting, parts: Parts, *, threshold: float = 0.0
) -> Drafter:
    """A drafter of ``family`` over the head at ``where``."""
    from pdspec.spec.eagle1.drafter import Eagle1Drafter

    group = group_name(family)
    head, matches, model = parts.once(DESCRIPTION.name, where, lambda: _load(where, group, setting, parts))
    model = model.over(parts.cache, group)
    gpu = parts.ops.device.type != "cpu" and family.default_tree_gpu
    return Eagle1Drafter(
        family.name, head, model, parts.cache, group=group, dtype=setting.dtype,
        tree=family.default_tree_gpu if gpu else family.default_tree, target_matches=matches,
        stable_kv=flag(setting, family, "stable_kv"), padding=flag(setting, family, "first_token_padding"),
        threshold=threshold,
    )


def _load(where: str, group: str, setting: Setting, parts: Parts) -> tuple[Head, bool, Eagle1Head]:
    """The head, whether it was made for these very weights, and its forward pass."""
    from pdspec.spec.eagle1.head import Eagle1Head
    from pdspec.spec.headfile import check_target

    head = open_head(where, setting)
    matches = check_target(head, setting.identity, where, strict=setting.strict)
    model = Eagle1Head(
        head, ops=parts.ops, embedding=parts.runner.embedding, lm_head=parts.runner.lm_head, cache=parts.cache,
        group=group, dtype=setting.dtype, max_positions=setting.target.config.max_context,
    )
    return head, matches, model


def group_name(family: Description) -> str:
    """Of its draft KV."""
    return f"draft/{family.name}"


def open_head(where: str, setting: Setting) -> Head:
    """The head that ``find_head`` named. Raises CheckpointError for a damaged one."""
    from pdspec.spec.eagle1.checkpoint import load_head, random_head

    if (seed := random_seed(where)) is not None:
        return random_head(_random_config(setting.target.config), seed, setting.identity)
    return load_head(Path(where))


def _random_config(target: ModelConfig) -> Eagle1Config:
    return Eagle1Config.for_target(target, min(_RANDOM_DRAFT_VOCABULARY, target.vocab_size // 2))
