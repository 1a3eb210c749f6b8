"""Self-drafting over sparse KV: the target's own weights and cache, nothing to load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdspec.spec.family import Description, Parts, Setting
from pdspec.spec.sparse.config import View
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

_TREE = "chain(4)"

DESCRIPTION = Description(
    name="sparse", summary="the target over a part of its own KV (sink, window, chosen prompt rows), for long contexts",
    needs="", ships="the chosen prompt rows' indices, with sparse:select=snapkv",
    trees=("chain", "static", "dynamic"), default_tree=_TREE,
    source="MagicDec: Chen et al. 2024, arXiv 2408.11049; SnapKV: Li et al. 2024, arXiv 2404.14469",
    options={"sink": "4", "window": "512", "select": "window", "budget": "512"},
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """No KV of its own. Raises ConfigError for an option that makes no sense."""
    _view(setting)
    return ()


def make(setting: Setting, parts: Parts) -> Drafter:
    """Over the target's runner and cache group."""
    from pdspec.spec.sparse.drafter import SparseDrafter

    return SparseDrafter(parts.runner, parts.cache, _view(setting), tree=_TREE)


def _view(setting: Setting) -> View:
    return View.parse(*(setting.option(DESCRIPTION, name) for name in ("sink", "window", "select", "budget")))
