"""How much to draft and to verify: pure functions of step times and survival.

    before drafting   how deep? from what a sequence's drafts have promised so far     best_depth
    after drafting    which nodes of all sequences together are worth their rows?      best_nodes

Both take the argmax of tokens per second, (R + Σ survival) / (draft(depth) + verify(R + B)), over *all* budgets B: R
sequences put out one token whatever was drafted, and step times are a staircase on which one row more may cost nothing
or a lot. Budget 0 is an answer like any other. Survival falls down a tree, so the best nodes are closed under parents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdspec.spec.protocol import Draft
from pdspec.spec.tree import depths

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
Seconds = Callable[[npt.NDArray[np.int64]], Doubles]  # of target forwards over so many rows


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``nodes`` B of the pool, and the tokens per second that they promise."""

    nodes: int
    goodput: float


def best_budget(tokens: int, rows: int, survival: Floats, draft_s: float, verify_s: Seconds) -> Choice:
    """The argmax over B in 0..N of ``survival`` [N], in falling order; the least of equals. ``tokens`` are put out and
    ``rows`` are in the forward whatever B is."""
    promised = tokens + np.concatenate(([0.0], np.cumsum(survival, dtype=np.float64)))
    goodput = promised / (draft_s + verify_s(rows + np.arange(len(promised))))
    best = int(goodput.argmax())
    return Choice(nodes=best, goodput=float(goodput[best]))


def best_nodes(drafts: Sequence[Draft], tokens: int, rows: int, draft_s: float, verify_s: Seconds) -> list[Ints]:
    """Of each draft the nodes [M] that are verified, ascending. Ties go to the shallower node, then to the earlier
    draft."""
    sizes = [draft.num_nodes for draft in drafts]
    survival = np.concatenate([draft.survival for draft in drafts]) if drafts else np.empty(0, np.float32)
    depth = np.concatenate([depths(draft.parents) for draft in drafts]) if drafts else np.empty(0, np.int32)
    order = np.lexsort((np.arange(len(survival)), depth, -survival))
    chosen = order[: best_budget(tokens, rows, survival[order], draft_s, verify_s).nodes]
    kept = np.zeros(len(survival), bool)
    kept[chosen] = True
    return [np.flatnonzero(part).astype(np.int32) for part in np.split(kept, np.cumsum(sizes)[:-1])] if drafts else []


def best_depth(prospects: Sequence[Floats], others: Floats, tokens: int, rows: int, draft_s: Doubles,
               verify_s: Seconds) -> tuple[int, Choice]:
    """How deep one family drafts for its sequences, 0: not at all. ``prospects`` [D, W] are the survival to expect of a
    sequence's nodes by depth, ``others`` [M] of all that other families draft; ``draft_s`` [D + 1] is the time that
    drafts of each depth take, the others' included."""
    found: list[Choice] = []
    for depth in range(len(draft_s)):
        pool = np.concatenate([others, *(expected[:depth].ravel() for expected in prospects)])
        pool = -np.sort(-pool[pool > 0])
        found.append(best_budget(tokens, rows, pool, float(draft_s[depth]), verify_s))
    best = int(np.argmax([choice.goodput for choice in found]))
    return best, found[best]


def profile(draft: Draft, depth: int, width: int) -> Floats:
    """What a draft promises by depth: survival of its nodes [depth, width], in falling order at each depth, 0 where it
    has fewer."""
    found = np.zeros((depth, width), np.float32)
    levels = depths(draft.parents)
    for level in range(1, min(depth, int(levels.max(initial=0))) + 1):
        best = -np.sort(-draft.survival[levels == level])[:width]
        found[level - 1, : len(best)] = best
    return found
