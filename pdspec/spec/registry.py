"""The draft families that can be chosen, and how one is made. Imports no torch until a drafter is made.

A drafter's cache groups must be known before the cache exists, so it is two steps:

    groups = draft_groups(names, setting)           the cache is made with these
    drafter = make_drafter(name, setting, parts)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from pdspec.errors import ConfigError, UnknownName
from pdspec.spec.family import Family, Parts, Setting
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

# One folder of pdspec/spec each.
NAMES = (
    "none", "ngram", "suffix", "lookahead", "medusa", "eagle1", "eagle2", "eagle3", "mtp", "draft_model", "sparse",
    "combined",
)  # fmt: skip


def family(name: str) -> Family:
    """Raises UnknownName."""
    if name not in NAMES:
        raise UnknownName(f"no drafter {name!r}", field="drafter", remedy="choose one of " + ", ".join(NAMES))
    return cast(Family, import_module(f"pdspec.spec.{name}.family"))


def describe() -> list[dict[str, Any]]:
    """One mapping per family, as ``pdspec drafters --json`` prints them."""
    return [asdict(family(name).DESCRIPTION) for name in NAMES]


def draft_groups(names: Sequence[str], setting: Setting) -> tuple[CacheGroup, ...]:
    """The cache groups that these families keep, each once. Raises as ``make_drafter``, and ConfigError for an option
    that no family has."""
    check_options(setting.options)
    groups = {group.name: group for name in names for group in family(name).groups(setting)}
    return tuple(groups.values())


def check_options(options: Iterable[str]) -> None:
    """Raises ConfigError for a key that is no FAMILY:OPTION."""
    known = [f"{name}:{option}" for name in NAMES for option in family(name).DESCRIPTION.options]
    for key in options:
        if key not in known:
            raise ConfigError(f"no option {key!r}", field="options",
                              remedy="use one of " + (", ".join(known) or "none: no family has any"))


def make_drafter(name: str, setting: Setting, parts: Parts) -> Drafter:
    """The drafter ``name`` for this target. Raises UnknownName, Incompatible (a head of another geometry or tokenizer;
    of other content when ``strict``), CheckpointError (a damaged head) or ConfigError (no head for this target)."""
    drafter = family(name).make(setting, parts)
    if use_survival := getattr(drafter, "use_survival", None):
        use_survival(setting.survival)
    return drafter
