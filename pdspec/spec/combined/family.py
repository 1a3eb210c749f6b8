"""The combination of suffix with a learned head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pdspec.errors import ConfigError
from pdspec.spec import registry
from pdspec.spec.family import Description, Family, Parts, Setting
from pdspec.spec.options import flag
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

DESCRIPTION = Description(
    name="combined", summary="suffix where a match is credible, a learned head otherwise, at every verification",
    needs="the head of the family that combined:head names (heads.combined, or what serves that family)",
    ships="what the head ships", trees=("chain", "static", "dynamic"), default_tree="dynamic(8,4,8)",
    source="Oliaro et al. 2024, SuffixDecoding, arXiv 2411.04975: its hybrid with a head", options={"head": "eagle3"},
)
_NO_HEADS = ("none", "suffix", DESCRIPTION.name)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """The head's."""
    family, inner = _head(setting)
    return family.groups(inner)


def make(setting: Setting, parts: Parts) -> Drafter:
    """A suffix drafter of its own beside a head, whose weights it shares with the head's own family where both use the
    same."""
    from pdspec.spec.combined.drafter import CombinedDrafter
    from pdspec.spec.suffix.drafter import SuffixDrafter

    family, inner = _head(setting)
    return CombinedDrafter(family.make(inner, parts), SuffixDrafter(), tree=DESCRIPTION.default_tree)


def _head(setting: Setting) -> tuple[Family, Setting]:
    """The head's family and what it is to be made with. Raises ConfigError for a family that is no head, and for a head
    that keeps rows of its own drafts: accepted tokens may be of a draft that it never made."""
    name = setting.option(DESCRIPTION, "head")
    heads_known = [one for one in registry.names(setting.plugins) if one not in _NO_HEADS]
    if name not in heads_known:
        raise ConfigError(f"{name!r} is no head to combine suffix with", field="options.combined:head",
                          remedy="use one of " + ", ".join(heads_known))
    family = registry.family(name, setting.plugins)
    if "stable_kv" in family.DESCRIPTION.options and not flag(setting, family.DESCRIPTION, "stable_kv"):
        raise ConfigError(
            f"combined cannot use {name} with {name}:stable_kv=false: it rebuilds the rows of accepted tokens",
            field=f"options.{name}:stable_kv", remedy="set it to true, or leave combined out",
        )
    heads = dict(setting.heads)
    if own := heads.pop(DESCRIPTION.name, ""):
        heads[name] = own
    return family, replace(setting, heads=heads)
