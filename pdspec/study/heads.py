"""Workers that hold the families a check or a study is about, each with a head: the one given, the shipped one, or,
where the question does not depend on what is drafted, a random one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError
from pdspec.model.files import resolve
from pdspec.spec import registry
from pdspec.spec.family import Setting

RANDOM = "random:7"
EVERY = "all"


def families(text: str, plugins: Sequence[str] = ()) -> tuple[str, ...]:
    """The families that a comma separated list names, each once; ``all`` stands for the registry with ``plugins``.
    Raises UnknownName, and ConfigError for an empty list."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name != EVERY:
            registry.family(name, plugins)
    if not names:
        raise ConfigError("no drafter is named", field="drafters", remedy="name some, or all")
    every = registry.names(plugins)
    return tuple(dict.fromkeys(one for name in names for one in (every if name == EVERY else (name,))))


def worker_config(worker: Mapping[str, Any], names: Sequence[str]) -> WorkerConfig:
    """``worker`` with ``none`` and the families ``names`` at hand. Without prefix caches unless it asks for them: what
    is asked again is handed over whole again. Raises ConfigError."""
    drafters = tuple(dict.fromkeys(("none", *names)))
    return WorkerConfig.from_mapping({"drafter": "none", "prefix_cache": "off", **worker, "drafters": drafters})


def with_random_heads(config: WorkerConfig) -> tuple[WorkerConfig, tuple[str, ...]]:
    """The worker with a random head for each of its families that has none, and the names of these."""
    heads = dict(config.heads)
    missing = []
    for name in _without_head(config, heads):
        heads[name] = RANDOM
        missing.append(name)
    return config.replace(heads=heads), tuple(missing)


def at_hand(worker: Mapping[str, Any]) -> tuple[str, ...]:
    """The families that can serve without a random head, in the registry's order."""
    config = worker_config(worker, registry.names(worker.get("plugins", ())))
    missing = tuple(_without_head(config, dict(config.heads)))
    return tuple(name for name in config.drafters if name not in missing)


def _without_head(config: WorkerConfig, heads: dict[str, str]) -> Iterator[str]:
    """Families of ``config`` that find no head, in the registry's order: what is put into ``heads`` meanwhile counts
    for those that may use another's."""
    files = resolve(config.model, config.cache_dir or None)
    setting = Setting(target=files, dtype=config.dtype, heads=heads, cache_dir=config.cache_dir, options=config.options,
                      plugins=config.plugins)  # fmt: skip
    for name in (one for one in registry.names(config.plugins) if one in config.drafters):
        try:
            registry.family(name, config.plugins).groups(replace(setting, heads=heads))
        except ConfigError as error:
            if not (error.field or "").startswith("heads."):
                raise
            yield name
