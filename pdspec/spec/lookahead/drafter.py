"""Lookahead decoding as a drafter: a pool of n-grams that begin with the root's token, filled by the Jacobi window.

Each verification's forward carries two things below the root: the n-grams of the pool, as a tree that is verified, and
the window's rows (``Draft.branch``), of which only the target's best tokens come back. What is put out depends on the
verified rows alone. Where a branch would leave the context it is left out, and the window waits.

The authors' code (hao-ai-lab/LookaheadDecoding) moves the window by one column however many tokens were accepted; so
does this. Their ``POOL_FROM_PROMPT`` is the option ``text``: n-grams of prompt and output enter the pool, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pdspec.errors import InvalidRequest
from pdspec.spec.lookahead.window import JacobiWindow, Ngram, most_rows
from pdspec.spec.model_free import ModelFree
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict, empty_draft
from pdspec.spec.survival import Calibrated, Forecast
from pdspec.spec.tree import ChainTree, DynamicTree, parse_tree

MAX_KEYS = 4096  # first tokens of a sequence's pool; the ones unused longest go first
_PRIOR, _PRIOR_WEIGHT = 0.5, 4.0  # of a guess being right, before there is any evidence


@dataclass(kw_only=True)
class LookaheadState:
    """One sequence: its window, and per first token the last ``guesses`` continuations, the latest last."""

    spec: ChainTree | DynamicTree
    window: JacobiWindow
    pool: dict[int, list[Ngram]] = field(default_factory=dict)
    indexed: int = 0  # tokens whose n-grams are in the pool
    proposed: bool = False  # whether an n-gram is under verification
    accepted: float = _PRIOR * _PRIOR_WEIGHT
    tried: float = _PRIOR_WEIGHT
    forecast: Forecast | None = None


class LookaheadDrafter(ModelFree, Calibrated):
    """``window`` W columns, n-grams of ``level`` N tokens, at most ``guesses`` G of them for one first token. ``text``:
    what stands in prompt and output is in the pool. No row stands at ``max_positions`` or beyond."""

    name = "lookahead"
    has_q = False

    def __init__(
        self, *, window: int = 7, level: int = 5, guesses: int = 7, text: bool = True, max_positions: int
    ) -> None:
        super().__init__()
        self.window, self.level, self.guesses, self.text = window, level, guesses, text
        self.max_positions = max_positions
        self.draft_nodes = guesses * (level - 1)
        self.max_nodes = self.draft_nodes + most_rows(window, level)
        self.default_tree = f"dynamic({level - 1},{guesses},{self.draft_nodes})"

    def fingerprint(self) -> str:
        """Both sides may hold any version of it: nothing is shipped."""
        return "lookahead/1"

    def depth(self, tree: str) -> int:
        """Deepest node under a request's tree. Raises InvalidRequest for what this drafter cannot make."""
        return self._spec(tree).depth

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Begins a window of tokens of the prompt, drawn by the request's seed, as the authors' code does."""
        self._state(ctx)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """The n-grams of each root's token, and the window's branch unless the budget is 0."""
        return [self._propose(ctx, budget) for ctx, budget in zip(batch, budgets, strict=True)]

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Completes n-grams by what the target said on the branch. Raises ValueError when that is of other rows."""
        for ctx, verdict, hidden in batch:
            state = self._state(ctx)
            if hidden.branch_ids is not None:
                root = ctx.token_ids[ctx.root_position - len(verdict.output_ids)]
                for ngram in state.window.advance(root, hidden.branch_ids):
                    self._remember(state, ngram)
            state.tried += state.proposed
            state.accepted += state.proposed and verdict.num_accepted > 0
            self._catch_up(ctx, state)
        self._learn(batch)

    def _spec(self, tree: str) -> ChainTree | DynamicTree:
        spec = parse_tree(tree or self.default_tree)
        fits = isinstance(spec, ChainTree | DynamicTree) and spec.depth < self.level
        if not fits or spec.max_nodes > self.draft_nodes:
            remedy = (f"use chain(k) or dynamic(depth,top_k,nodes), depth in 1..{self.level - 1}, one below the"
                      f" n-gram's length, and at most {self.draft_nodes} nodes")
            raise InvalidRequest(f"drafter {self.name} cannot draft {tree}", field="tree", remedy=remedy)
        assert isinstance(spec, ChainTree | DynamicTree)
        return spec

    def _state(self, ctx: DraftContext) -> LookaheadState:
        if ctx.state is None:
            random = np.random.default_rng(ctx.noise_key)
            guesses = random.choice(ctx.token_ids[: ctx.prompt_len], self.window + self.level - 3)
            ctx.state = LookaheadState(
                spec=self._spec(ctx.tree), window=JacobiWindow.begin(self.window, self.level, guesses.tolist())
            )
            self._catch_up(ctx, ctx.state)
        state: LookaheadState = ctx.state
        return state

    def _remember(self, state: LookaheadState, ngram: Ngram) -> None:
        first, rest = ngram[0], ngram[1:]
        known = [one for one in state.pool.pop(first, ()) if one != rest]
        state.pool[first] = [*known[-self.guesses + 1 :], rest] if self.guesses > 1 else [rest]
        if len(state.pool) > MAX_KEYS:
            del state.pool[next(iter(state.pool))]

    def _catch_up(self, ctx: DraftContext, state: LookaheadState) -> None:
        """The n-grams of the text that are complete and not in yet."""
        if not self.text:
            return
        for end in range(max(state.indexed, self.level - 1), len(ctx.token_ids)):
            self._remember(state, tuple(ctx.token_ids[end - self.level + 1 : end + 1]))
        state.indexed = len(ctx.token_ids)

    def _propose(self, ctx: DraftContext, budget: int) -> Draft:
        state = self._state(ctx)
        state.proposed = False
        if budget < 1:
            return empty_draft()
        deepest = ctx.root_position + self.window + self.level - 3
        branch = state.window.branch() if deepest < self.max_positions else None
        ngrams = state.pool.get(ctx.token_ids[-1], [])[::-1]
        tokens, parents, survival = _tree(ngrams, state.spec, budget, state.accepted / state.tried)
        state.proposed = bool(tokens)
        draft = Draft(
            token_ids=np.array(tokens, np.int32), parents=np.array(parents, np.int32), branch=branch,
            log_q=np.full(len(tokens), np.nan, np.float32), survival=np.array(survival, np.float32),
        )
        return self._calibrate(ctx, draft, self.level - 1)


def _tree(
    ngrams: Sequence[Ngram], spec: ChainTree | DynamicTree, budget: int, rate: float
) -> tuple[list[int], list[int], list[float]]:
    """(token ids, parents, survival) of the n-grams, the latest first, as one tree. Survival is a guess: ``rate`` a
    level, and half as much for each later n-gram."""
    top_k, nodes = spec.top_k if isinstance(spec, DynamicTree) else 1, min(budget, spec.max_nodes)
    tokens: list[int] = []
    parents: list[int] = []
    survival: list[float] = []
    children: dict[int, dict[int, int]] = {}
    for rank, ngram in enumerate(ngrams):
        node = -1
        for depth, token in enumerate(ngram[: spec.depth], 1):
            below = children.setdefault(node, {})
            if token not in below:
                if len(below) == top_k or len(tokens) == nodes:
                    break
                below[token] = len(tokens)
                tokens.append(token)
                parents.append(node)
                survival.append(rate**depth * 0.5**rank)
            node = below[token]
    return tokens, parents, survival
