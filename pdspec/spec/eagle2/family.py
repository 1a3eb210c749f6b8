"""EAGLE-2: an EAGLE-1 head whose trees grow where the draft is confident. Trees are in ``growth.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdspec.spec.eagle1.family import DESCRIPTION as EAGLE1
from pdspec.spec.eagle1.family import layer_groups, make_drafter
from pdspec.spec.family import Description, Parts, Setting
from pdspec.spec.heads import find_head
from pdspec.spec.options import FEATURE_OPTIONS, probability
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

DESCRIPTION = Description(
    name="eagle2", summary="EAGLE-1's head with a dynamic tree: expanded and pruned by cumulative score",
    needs="an EAGLE-1 head trained for the target (heads.eagle2 or heads.eagle1: FOLDER or random:SEED)",
    ships=EAGLE1.ships, trees=EAGLE1.trees, default_tree="dynamic(4,4,8)",
    source="Li et al. 2024, EAGLE-2, arXiv 2406.16858", options={**FEATURE_OPTIONS, "threshold": "0"},
    formats=EAGLE1.formats,
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """One layer."""
    return layer_groups(DESCRIPTION, _where(setting), setting)


def make(setting: Setting, parts: Parts) -> Drafter:
    """The head of ``heads.eagle2``, else the one that eagle1 has, checked against the target."""
    threshold = probability(setting, DESCRIPTION, "threshold")
    return make_drafter(DESCRIPTION, _where(setting), setting, parts, threshold=threshold)


def _where(setting: Setting) -> str:
    return setting.heads.get(DESCRIPTION.name) or find_head(EAGLE1.name, setting.heads, setting.identity)
