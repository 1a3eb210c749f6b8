"""Prompt lookup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdspec.spec.family import Description, Parts, Setting
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

DESCRIPTION = Description(
    name="ngram", summary="prompt lookup: what followed these tokens the last time they stood here", needs="",
    ships="", trees=("chain",), default_tree="chain(7)", source="Saxena 2023, Prompt Lookup Decoding",
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """No KV of its own."""
    return ()


def make(setting: Setting, parts: Parts) -> Drafter:
    """Needs nothing of the target."""
    from pdspec.spec.ngram.drafter import NgramDrafter

    return NgramDrafter()
