"""SuffixDecoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdspec.spec.family import Description, Parts, Setting
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

DESCRIPTION = Description(
    name="suffix", summary="what followed these tokens in this request and in earlier answers, by frequency",
    needs="", ships="", trees=("chain", "dynamic"), default_tree="dynamic(8,4,8)",
    source="Oliaro et al. 2024, SuffixDecoding, arXiv 2411.04975",
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """No KV of its own."""
    return ()


def make(setting: Setting, parts: Parts) -> Drafter:
    """Needs nothing of the target."""
    from pdspec.spec.suffix.drafter import SuffixDrafter

    return SuffixDrafter()
