"""What a draft family is to the registry: a module. Each of the package's has a folder with the same file names:
``family.py`` (this, and no torch at import), ``drafter.py`` and, where it has weights, ``config.py``, ``checkpoint.py``
and ``head.py``. A plug-in's may be one file (``plugins.py``).

    groups(setting)        its cache groups: the cache is made with these
    make(setting, parts)   the drafter over that cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pdspec.model.files import ModelFiles
from pdspec.spec.heads import TargetIdentity
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.cache.paged import PagedCache
    from pdspec.model.ops import Ops
    from pdspec.model.runner import Runner
    from pdspec.spec.protocol import Drafter

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``pdspec drafters`` says of one family."""

    name: str
    summary: str
    needs: str  # beyond the target
    ships: str  # from the prefill to the decode worker
    trees: tuple[str, ...]  # kinds of ``tree``
    default_tree: str
    source: str
    default_tree_gpu: str = ""  # where it is another one
    options: dict[str, str] = field(default_factory=dict)  # its settings and their defaults
    formats: tuple[str, ...] = ()  # of heads that it reads; see docs/checkpoints.md


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a family may know of its deployment before there is a KV cache. ``heads`` maps family to folder (or
    ``random:SEED``), without an entry the shipped head serves; KV rows and weights are in ``dtype``."""

    target: ModelFiles
    dtype: str
    heads: Mapping[str, str]
    strict: bool = False  # refuse a head made for other weights of the target's geometry
    cache_dir: str = ""
    options: Mapping[str, str] = field(default_factory=dict)  # by FAMILY:OPTION
    survival: str = "fixed"  # see survival.py
    plugins: tuple[str, ...] = ()  # files and modules of further families

    def option(self, family: Description, name: str) -> str:
        """What an option of a family is set to."""
        return self.options.get(f"{family.name}:{name}", family.options[name])

    @property
    def identity(self) -> TargetIdentity:
        """The target as heads know it."""
        target = self.target
        return TargetIdentity.of(
            target.config, content_hash=target.content_hash, tokenizer_hash=target.tokenizer_hash
        )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a drafter works with. ``runner`` is the target: embedding and lm_head are packed by ``ops``. ``loaded`` has
    what ``once`` made, for as long as drafters are made."""

    ops: Ops
    cache: PagedCache
    runner: Runner
    loaded: dict[tuple[str, str], Any] = field(default_factory=dict)

    def once(self, family: str, where: str, load: Callable[[], T]) -> T:
        """What ``load`` makes of the head at ``where`` (as ``find_head`` names it): drafters of one worker that use the
        same head hold its weights once."""
        if (family, where) not in self.loaded:
            self.loaded[family, where] = load()
        found: T = self.loaded[family, where]
        return found


class Family(Protocol):
    """A ``family.py`` module."""

    DESCRIPTION: Description

    def groups(self, setting: Setting) -> tuple[CacheGroup, ...]:
        """Raises as ``make``."""

    def make(self, setting: Setting, parts: Parts) -> Drafter:
        """Raises Incompatible (a head of another geometry or tokenizer; of other content when ``strict``),
        CheckpointError (a damaged head) or ConfigError (no head for this target)."""
