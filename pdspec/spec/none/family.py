"""Plain decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdspec.spec.family import Description, Parts, Setting
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

DESCRIPTION = Description(
    name="none", summary="plain decoding", needs="", ships="", trees=(), default_tree="", source=""
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """No KV of its own."""
    return ()


def make(setting: Setting, parts: Parts) -> Drafter:
    """Needs nothing of the target."""
    from pdspec.spec.none.drafter import NoDrafter

    return NoDrafter()
