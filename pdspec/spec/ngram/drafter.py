"""Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"): what followed these tokens the last time they stood here.

No model, no KV, nothing to ship: the context itself is the drafter. The longest suffix of at most ``longest`` tokens
that stood somewhere before is looked up in an index of the sequence; what came after its latest earlier occurrence
is proposed as a chain. An occurrence that overlaps the suffix repeats, so that loops are followed to the full depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pdspec.spec.model_free import ModelFree, guessed_chain
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict, empty_draft
from pdspec.spec.survival import Calibrated, Forecast

_PRIOR = (0.35, 0.5, 0.65, 0.8)  # acceptance of a proposal by match length, before there is any evidence
_PRIOR_WEIGHT = 4.0


@dataclass(kw_only=True)
class NgramState:
    """The index of one sequence. ``ends[n - 1]`` maps n tokens to the position of the last of them at their latest
    occurrence, of those that have a successor; ``indexed`` tokens are in. Evidence is per match length."""

    ends: tuple[dict[tuple[int, ...], int], ...]
    indexed: int = 0
    proposed: int = 0  # match length of the proposal under verification; 0: none
    accepted: list[float] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)
    forecast: Forecast | None = None


class NgramDrafter(ModelFree, Calibrated):
    """Chains copied out of the context; ``max_nodes`` bounds the chain that a request may ask for."""

    name = "ngram"
    default_tree = "chain(7)"
    has_q = False

    def __init__(self, max_nodes: int = 32, longest: int = 4) -> None:
        if not 1 <= longest <= len(_PRIOR):
            raise ValueError(f"longest match {longest}, not in 1..{len(_PRIOR)}")
        super().__init__()
        self.max_nodes = max_nodes
        self.longest = longest

    def fingerprint(self) -> str:
        """Both sides may hold any version of it: nothing is shipped."""
        return f"ngram/1/{self.longest}"

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Indexes the prompt."""
        _catch_up(self._state(ctx), ctx.token_ids)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """A chain for each sequence, empty where no suffix stood before. Raises InvalidRequest for another tree."""
        return [self._propose(ctx, budget) for ctx, budget in zip(batch, budgets, strict=True)]

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Counts, per match length, whether the first proposed token was right."""
        for ctx, verdict, _ in batch:
            state = self._state(ctx)
            if state.proposed:
                state.tried[state.proposed - 1] += 1
                state.accepted[state.proposed - 1] += verdict.num_accepted > 0
                state.proposed = 0
        self._learn(batch)

    def _state(self, ctx: DraftContext) -> NgramState:
        if ctx.state is None:
            ctx.state = NgramState(
                ends=tuple({} for _ in range(self.longest)),
                accepted=[p * _PRIOR_WEIGHT for p in _PRIOR[: self.longest]], tried=[_PRIOR_WEIGHT] * self.longest,
            )
        state: NgramState = ctx.state
        return state

    def _propose(self, ctx: DraftContext, budget: int) -> Draft:
        state, tokens = self._state(ctx), ctx.token_ids
        _catch_up(state, tokens)
        state.proposed = 0
        length = min(budget, self.depth(ctx.tree))
        end, matched = _longest_match(state, tokens)
        if matched == 0 or length < 1:
            return empty_draft()
        state.proposed = matched
        period = len(tokens) - 1 - end
        source = tokens[end + 1 : end + 1 + length]
        chain = [source[i % period] for i in range(length)]
        acceptance = state.accepted[matched - 1] / state.tried[matched - 1]
        return self._calibrate(ctx, guessed_chain(chain, acceptance), matched)


def _catch_up(state: NgramState, tokens: Sequence[int]) -> None:
    """Indexes the n-grams that end before the last token and are not in yet: O(new tokens)."""
    last = len(tokens) - 1
    for n, ends in enumerate(state.ends, start=1):
        first = max(state.indexed - n + 1, 0)  # where the earliest new n-gram begins
        shifted = [tokens[first + i : last] for i in range(n)]
        ends.update(zip(zip(*shifted, strict=False), range(first + n - 1, last), strict=False))
    state.indexed = max(state.indexed, last)


def _longest_match(state: NgramState, tokens: Sequence[int]) -> tuple[int, int]:
    """(position of its last token at the latest earlier occurrence, length) of the longest known suffix; (-1, 0)."""
    for n in range(min(len(state.ends), len(tokens)), 0, -1):
        end = state.ends[n - 1].get(tuple(tokens[len(tokens) - n :]))
        if end is not None:
            return end, n
    return -1, 0
