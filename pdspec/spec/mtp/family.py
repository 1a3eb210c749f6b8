"""MTP: which modules serve a target, and the drafter over them.

mtp:modules    how many of a head's modules are used; empty: all. A random head has as many, or 2
mtp:reuse      true: module 1 drafts every depth, the others are not loaded
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pdspec.errors import ConfigError
from pdspec.model.config import ModelConfig
from pdspec.spec.family import Description, Parts, Setting
from pdspec.spec.formats import readable
from pdspec.spec.heads import find_head, random_seed, read_head_json
from pdspec.spec.mtp.config import FAMILY, MtpConfig, parse_head
from pdspec.spec.options import flag
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.mtp.checkpoint import Head
    from pdspec.spec.mtp.head import MtpModule
    from pdspec.spec.protocol import Drafter

_RANDOM_DRAFT_VOCABULARY, _RANDOM_MODULES = 4096, 2
_REUSED_TREE, _REUSED_TREE_GPU = "chain(2)", "dynamic(4,4,8)"

DESCRIPTION = Description(
    name="mtp",
    summary="DeepSeek-V3's modules in series, one decoder layer and KV for each token ahead; or one reused",
    needs="modules trained for the target (heads.mtp: FOLDER or random:SEED)",
    ships="draft KV of each module, first draft tokens with log q, one hidden row of each module but the last",
    trees=("chain", "static", "dynamic"),
    default_tree="chain(2)",
    default_tree_gpu="dynamic(2,4,8)",
    source="DeepSeek-AI 2024, DeepSeek-V3, arXiv 2412.19437, section 2.2; reuse: EAGLE-style serving of one module",
    options={"modules": "", "reuse": "false"},
    formats=readable(FAMILY),
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """One layer for each module."""
    where = find_head(DESCRIPTION.name, setting.heads, setting.identity)
    if random_seed(where) is not None:
        config = _random_config(setting)
    else:
        config, _, _ = parse_head(read_head_json(Path(where)), Path(where))
    return tuple(config.cache_group(m, setting.dtype) for m in range(1, _num_used(setting, config) + 1))


def make(setting: Setting, parts: Parts) -> Drafter:
    """The modules that ``find_head`` names, checked against the target."""
    from pdspec.spec.mtp.drafter import MtpDrafter, ReusedModule

    where = find_head(DESCRIPTION.name, setting.heads, setting.identity)
    head, matches, modules = parts.once(DESCRIPTION.name, where, lambda: _load(where, setting, parts))
    on_cpu, count = parts.ops.device.type == "cpu", len(modules)
    if flag(setting, DESCRIPTION, "reuse"):
        tree = _REUSED_TREE if on_cpu else _REUSED_TREE_GPU
        return ReusedModule(head, modules[0], parts.cache, dtype=setting.dtype, tree=tree, target_matches=matches)
    tree = f"chain({count})" if on_cpu else f"dynamic({count},4,8)"
    return MtpDrafter(head, modules, parts.cache, dtype=setting.dtype, tree=tree, target_matches=matches)


def _load(where: str, setting: Setting, parts: Parts) -> tuple[Head, bool, list[MtpModule]]:
    """The modules as a file, whether they were made for these very weights, and those that are used."""
    from pdspec.spec.headfile import check_target
    from pdspec.spec.mtp.head import make_modules

    head = open_head(where, setting)
    matches = check_target(head, setting.identity, where, strict=setting.strict)
    modules = make_modules(
        head,
        _num_used(setting, head.config),
        ops=parts.ops,
        embedding=parts.runner.embedding,
        lm_head=parts.runner.lm_head,
        cache=parts.cache,
        dtype=setting.dtype,
        max_positions=setting.target.config.max_context,
    )
    return head, matches, modules


def open_head(where: str, setting: Setting) -> Head:
    """The modules that ``find_head`` named. Raises CheckpointError for damaged ones."""
    from pdspec.spec.mtp.checkpoint import load_head, random_head

    if (seed := random_seed(where)) is not None:
        return random_head(_random_config(setting), seed, setting.identity)
    return load_head(Path(where))


def _num_used(setting: Setting, config: MtpConfig) -> int:
    if flag(setting, DESCRIPTION, "reuse"):
        return 1
    count = _asked(setting) or config.num_modules
    if count > config.num_modules:
        raise ConfigError(
            f"mtp:modules is {count}, the head has {config.num_modules}",
            field="options.mtp:modules",
            remedy=f"keep it at {config.num_modules} or below, or leave it empty",
        )
    return count


def _asked(setting: Setting) -> int:
    """0: all."""
    text = setting.option(DESCRIPTION, "modules")
    if text and not (text.isdecimal() and 1 <= int(text) <= 64):
        raise ConfigError(f"mtp:modules is {text!r}", field="options.mtp:modules", remedy="a whole number in 1..64")
    return int(text or 0)


def _random_config(setting: Setting) -> MtpConfig:
    target: ModelConfig = setting.target.config
    return MtpConfig.for_target(
        target, min(_RANDOM_DRAFT_VOCABULARY, target.vocab_size // 2), _asked(setting) or _RANDOM_MODULES
    )
