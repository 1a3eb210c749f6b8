"""The draft families that can be chosen, and how one is made. Imports no torch until a drafter is made.

Families of the package are in ``NAMES``; ``plugins`` brings others (see ``plugins.py``), and so do installed packages.
A drafter's cache groups must be known before the cache exists, so it is two steps:

    groups = draft_groups(names, setting)           the cache is made with these
    drafter = make_drafter(name, setting, parts)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pdspec.errors import ConfigError, UnknownName
from pdspec.spec import plugins as outer
from pdspec.spec.family import Family, Parts, Setting
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

T = TypeVar("T")

# The package's own: one folder of pdspec/spec each.
NAMES = (
    "none", "ngram", "suffix", "lookahead", "medusa", "eagle1", "eagle2", "eagle3", "mtp", "draft_model", "sparse",
    "combined",
)  # fmt: skip


def names(plugins: Sequence[str] = ()) -> tuple[str, ...]:
    """Every family: the package's, those of installed packages, those of ``plugins``. Raises ConfigError."""
    return (*NAMES, *outer.outside(plugins, NAMES))


def family(name: str, plugins: Sequence[str] = ()) -> Family:
    """Raises UnknownName, and ConfigError for a plug-in that is no family."""
    if name in NAMES:
        return cast(Family, import_module(f"pdspec.spec.{name}.family"))
    others = outer.outside(plugins, NAMES)
    if name not in others:
        known = ", ".join((*NAMES, *others))
        raise UnknownName(f"no drafter {name!r}", field="drafter", remedy=f"choose one of {known}")
    return others[name]


def describe(plugins: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One mapping per family, as ``pdspec drafters --json`` prints them. Raises ConfigError."""
    return [asdict(family(name, plugins).DESCRIPTION) for name in names(plugins)]


def draft_groups(names: Sequence[str], setting: Setting) -> tuple[CacheGroup, ...]:
    """The cache groups that these families keep, each once. Raises as ``make_drafter``, and ConfigError for an option
    that no family has, and for two groups of one name."""
    check_options(setting.options, setting.plugins)
    groups: dict[str, CacheGroup] = {}
    for name in names:
        for group in _called(name, setting, lambda found: found.groups(setting)):
            if groups.setdefault(group.name, group) != group:
                raise ConfigError(f"{group.name} of {name} is another group than another family's", field="drafters",
                                  remedy="call a family's groups draft/NAME, or draft/NAME/…")
    return tuple(groups.values())


def check_options(options: Iterable[str], plugins: Sequence[str] = ()) -> None:
    """Raises ConfigError for a key that is no FAMILY:OPTION."""
    known = [f"{name}:{option}" for name in names(plugins) for option in family(name, plugins).DESCRIPTION.options]
    for key in options:
        if key not in known:
            raise ConfigError(f"no option {key!r}", field="options",
                              remedy="use one of " + (", ".join(known) or "none: no family has any"))


def make_drafter(name: str, setting: Setting, parts: Parts) -> Drafter:
    """The drafter ``name`` for this target. Raises UnknownName, Incompatible (a head of another geometry or tokenizer;
    of other content when ``strict``), CheckpointError (a damaged head) or ConfigError (no head for this target)."""
    drafter = _called(name, setting, lambda found: found.make(setting, parts))
    if name not in NAMES:
        _check_members(drafter, name)
    if use_survival := getattr(drafter, "use_survival", None):
        use_survival(setting.survival)
    return drafter


def _called(name: str, setting: Setting, call: Callable[[Family], T]) -> T:
    """``call`` of a family; an error in a plug-in's code becomes a ConfigError."""
    found = family(name, setting.plugins)
    return call(found) if name in NAMES else outer.guarded(f"drafter {name}", lambda: call(found))


def _check_members(drafter: Drafter, name: str) -> None:
    """Raises ConfigError for what is no ``Drafter``, or another's."""
    from pdspec.spec import protocol

    promised = protocol.Drafter
    wanted = [*promised.__annotations__, *(member for member in vars(promised) if not member.startswith("_"))]
    if missing := [member for member in wanted if not hasattr(drafter, member)]:
        raise ConfigError(f"drafter {name} has no {', no '.join(missing)}", field="plugins",
                          remedy="see pdspec.spec.protocol.Drafter, and ModelFree for what needs no model")
    if drafter.name != name:
        raise ConfigError(f"drafter {name} calls itself {drafter.name!r}", field="plugins",
                          remedy="give both the name of DESCRIPTION")
