"""No draft at all: plain decoding as one more drafter, the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from pdspec.spec.model_free import ModelFree
from pdspec.spec.protocol import Draft, DraftContext, empty_draft


class NoDrafter(ModelFree):
    """Proposes nothing, so that each verification is a plain decode step."""

    name = "none"
    max_nodes = 0
    default_tree = ""

    def fingerprint(self) -> str:
        """It holds nothing that two sides could differ in."""
        return "none/1"

    def depth(self, tree: str) -> int:
        """Whatever the tree, nothing is drafted."""
        return 0

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """Empty drafts."""
        return [empty_draft() for _ in batch]
