"""EAGLE-3: which head serves a target, and the drafter over it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdspec.errors import CheckpointError
from pdspec.model.config import ModelConfig
from pdspec.spec.eagle3.config import FAMILY, Eagle3Config, parse_head
from pdspec.spec.family import Description, Parts, Setting
from pdspec.spec.formats import readable
from pdspec.spec.heads import find_head, random_seed, read_head_json
from pdspec.spec.options import FEATURE_OPTIONS, flag
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.eagle3.checkpoint import Head
    from pdspec.spec.eagle3.head import Eagle3Head
    from pdspec.spec.protocol import Drafter

# A row more costs a CPU real compute from the third row on; a GPU takes eight for the price of one.
_TREE, _TREE_GPU = "chain(2)", "dynamic(4,4,8)"
_RANDOM_DRAFT_VOCABULARY = 4096

DESCRIPTION = Description(
    name="eagle3", summary="one decoder layer over three fused levels of the target, with a draft vocabulary",
    needs="a head trained for the target (shipped for smollm2-135m; else heads.eagle3: FOLDER or random:SEED)",
    ships="draft KV of the prompt, first draft tokens with log q, one hidden row",
    trees=("chain", "static", "dynamic"), default_tree=_TREE, default_tree_gpu=_TREE_GPU,
    source="Li et al. 2025, EAGLE-3, arXiv 2503.01840; trees: EAGLE-2, arXiv 2406.16858", options=FEATURE_OPTIONS,
    formats=readable(FAMILY),
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """One layer."""
    where, target = find_head(DESCRIPTION.name, setting.heads, setting.identity), setting.target.config
    if random_seed(where) is not None:
        return (_random_config(target).cache_group(setting.dtype),)
    config, _, _ = parse_head(read_head_json(Path(where)), Path(where), target.num_layers)
    return (config.cache_group(setting.dtype),)


def make(setting: Setting, parts: Parts) -> Drafter:
    """The head that ``find_head`` names, checked against the target."""
    from pdspec.spec.eagle3.drafter import Eagle3Drafter

    where = find_head(DESCRIPTION.name, setting.heads, setting.identity)
    head, matches, model = parts.once(DESCRIPTION.name, where, lambda: _load(where, setting, parts))
    tree = _TREE if parts.ops.device.type == "cpu" else _TREE_GPU
    return Eagle3Drafter(
        head, model, parts.cache, dtype=setting.dtype, tree=tree, target_matches=matches,
        stable_kv=flag(setting, DESCRIPTION, "stable_kv"), padding=flag(setting, DESCRIPTION, "first_token_padding"),
    )


def _load(where: str, setting: Setting, parts: Parts) -> tuple[Head, bool, Eagle3Head]:
    """The head, whether it was made for these very weights, and its forward pass."""
    from pdspec.spec.eagle3.head import Eagle3Head
    from pdspec.spec.headfile import check_target

    target, head = setting.target.config, open_head(where, setting)
    matches = check_target(head, setting.identity, where, strict=setting.strict)
    if max(head.config.fused_layers) >= target.num_layers:
        raise CheckpointError(
            f"the head in {where} fuses layers {head.config.fused_layers}, the target has {target.num_layers}",
            field="fused_layers", remedy="choose the head made for this target",
        )
    model = Eagle3Head(head, ops=parts.ops, embedding=parts.runner.embedding, lm_head=parts.runner.lm_head,
                       cache=parts.cache, dtype=setting.dtype, max_positions=target.max_context)
    return head, matches, model


def open_head(where: str, setting: Setting) -> Head:
    """The head that ``find_head`` named. Raises CheckpointError for a damaged one."""
    from pdspec.spec.eagle3.checkpoint import load_head, random_head

    if (seed := random_seed(where)) is not None:
        return random_head(_random_config(setting.target.config), seed, setting.identity)
    return load_head(Path(where), setting.target.config.num_layers)


def _random_config(target: ModelConfig) -> Eagle3Config:
    return Eagle3Config.for_target(target, min(_RANDOM_DRAFT_VOCABULARY, target.vocab_size // 2))
