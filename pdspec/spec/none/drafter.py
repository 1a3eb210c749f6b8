"""No draft at all: plain decoding as one more drafter, the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict, empty_draft
from pdspec.types import CacheGroup


class NoDrafter:
    """Proposes nothing, so that each verification is a plain decode step."""

    name = "none"
    groups: tuple[CacheGroup, ...] = ()
    capture: tuple[int, ...] = ()
    want_final = False
    ahead = carry = 0
    stable_kv = True
    max_nodes = 0
    default_tree = ""

    def fingerprint(self) -> str:
        """It holds nothing that two sides could differ in."""
        return "none/1"

    def depth(self, tree: str) -> int:
        """Whatever the tree, nothing is drafted."""
        return 0

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """No groups."""
        return {}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Nothing to build."""

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """Nothing to ship."""
        return None, {}

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Nothing to take over."""

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """Empty drafts."""
        return [empty_draft() for _ in batch]

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Nothing to learn."""
