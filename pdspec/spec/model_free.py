"""What drafters without a model have in common: no KV, no hidden states, nothing to ship, chains by default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pdspec.errors import InvalidRequest
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict, empty_draft
from pdspec.spec.tree import ChainTree, parse_tree
from pdspec.types import CacheGroup


class ModelFree:
    """The quiet part of a ``Drafter``. A family names itself (``name``, ``default_tree``, ``max_nodes``), and has
    ``fingerprint`` and ``propose``."""

    name: str
    default_tree: str
    max_nodes: int
    groups: tuple[CacheGroup, ...] = ()
    capture: tuple[int, ...] = ()
    want_final = False
    ahead = carry = 0
    stable_kv = True

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """No groups."""
        return {}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Nothing: what is known of the prompt is kept where it is used."""

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """Nothing to ship."""
        return None, {}

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Nothing to take over but the tokens, which are in ``ctx``."""

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Nothing to learn but the tokens, which are in each ``ctx``."""

    def depth(self, tree: str) -> int:
        """Longest chain under a request's tree. Raises InvalidRequest for what this drafter cannot make."""
        spec = parse_tree(tree or self.default_tree)
        if not isinstance(spec, ChainTree) or spec.depth > self.max_nodes:
            remedy = f"use chain(k) with k in 1..{self.max_nodes}"
            raise InvalidRequest(f"drafter {self.name} cannot draft {tree}", field="tree", remedy=remedy)
        return spec.depth


def guessed_chain(token_ids: Sequence[int], acceptance: float) -> Draft:
    """A chain of N guesses without q: each is right with chance ``acceptance`` where the one before was."""
    length = len(token_ids)
    if length == 0:
        return empty_draft()
    return Draft(
        token_ids=np.array(token_ids, np.int32), parents=np.arange(-1, length - 1, dtype=np.int32),
        log_q=np.full(length, np.nan, np.float32),
        survival=np.power(np.float32(acceptance), np.arange(1, length + 1, dtype=np.float32)),
    )
