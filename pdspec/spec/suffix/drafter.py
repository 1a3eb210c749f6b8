"""SuffixDecoding (Oliaro et al. 2024, 2411.04975): what followed these tokens before, weighed by how often.

No model, no KV, nothing to ship. Two suffix trees are searched for the longest suffix of the sequence: the request's
own (prompt and output) and one that all requests of this worker share (their outputs, bounded, the oldest dropped):

    longest match in each ──▶ grown best first by count(node) / count(match) ──▶ the tree of the higher score sum

A node's share of the places is the product of count(child) / count(parent) down its path: its survival. At most
``alpha`` nodes per matched token are drafted: the longer the match, the further it is trusted.

A request's output enters the shared tree as it is observed (its last verification never is), and is left out when that
request itself searches there. So proposals depend on what the worker served before; the tokens put out do not. Their
pace does: whoever may ask can tell from it what others were answered. Leave the family out of ``drafters`` where
requests must learn nothing of one another.

Frequencies are no chances: over 200 GSM8K solutions written down by people (SmolLM2's tokens, at most 8 nodes) survival
sums to 4.5 times what is accepted at alpha 2. Tokens put out per verification there: 1.61, 1.73 and 1.81 at alpha 1, 2
and 4 with 2.5, 4.5 and 6.3 nodes; ngram chain(7): 1.56 with 5.2.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pdspec.errors import InvalidRequest
from pdspec.spec.model_free import ModelFree
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict, empty_draft
from pdspec.spec.suffix.tree import Match, RequestTree, SharedTree
from pdspec.spec.survival import Calibrated, Forecast
from pdspec.spec.tree import ChainTree, DynamicTree, parse_tree

SHARED_TOKENS = 65536  # of earlier answers, 8 bytes each
ALPHA = 2.0  # nodes per matched token
LEAST_SURVIVAL = 0.1  # nodes below are not worth a row of the target


@dataclass(kw_only=True, eq=False)
class SuffixState:
    """One request: what it asked for, its own tree, how many of its tokens the shared tree has had, and its key there,
    which refers to nothing: of a request that is gone the shared tree keeps tokens alone."""

    spec: ChainTree | DynamicTree
    tree: RequestTree = field(default_factory=RequestTree)
    shared: int
    key: object = field(default_factory=object)
    forecast: Forecast | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Grown:
    """A draft of a match of ``matched`` tokens, with the sum of its nodes' survival: the expected number of accepted
    nodes, were frequencies chances."""

    draft: Draft
    score: float
    matched: int = 0


class SuffixDrafter(ModelFree, Calibrated):
    """Trees copied out of the context and of earlier answers. ``max_nodes`` bounds what a request may ask for,
    ``shared_tokens`` the tokens of all earlier answers together, ``alpha`` the nodes per matched token."""

    name = "suffix"
    default_tree = "dynamic(8,4,8)"
    has_q = False

    def __init__(self, max_nodes: int = 32, shared_tokens: int = SHARED_TOKENS, alpha: float = ALPHA) -> None:
        """Raises ValueError for a bound below one token or an ``alpha`` that is not above 0."""
        if not alpha > 0:
            raise ValueError(f"alpha {alpha} is not above 0")
        super().__init__()
        self.max_nodes = max_nodes
        self.alpha = alpha
        self.shared = SharedTree(shared_tokens)

    def fingerprint(self) -> str:
        """Both sides may hold any version of it: nothing is shipped."""
        return "suffix/1"

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Makes the request's own tree from the prompt and the first token."""
        self._state(ctx)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """A tree for each sequence, empty where its last token never stood before. Raises InvalidRequest for a tree
        that ``depth`` refuses."""
        return [self._propose(ctx, budget) for ctx, budget in zip(batch, budgets, strict=True)]

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """The outputs enter the request's own tree and the shared one."""
        for ctx, _, _ in batch:
            state = self._state(ctx)
            self.shared.extend(state.key, ctx.token_ids[state.shared :])
            state.shared = len(ctx.token_ids)
        self._learn(batch)

    def depth(self, tree: str) -> int:
        """Deepest node under a request's tree. Raises InvalidRequest for what this drafter cannot make."""
        spec = self._spec(tree)
        return min(spec.depth, spec.max_nodes)

    def _spec(self, tree: str) -> ChainTree | DynamicTree:
        spec = parse_tree(tree or self.default_tree)
        if not isinstance(spec, ChainTree | DynamicTree) or spec.max_nodes > self.max_nodes:
            remedy = f"use chain(k) or dynamic(depth,top_k,nodes) with k and nodes in 1..{self.max_nodes}"
            raise InvalidRequest(f"drafter {self.name} cannot draft {tree}", field="tree", remedy=remedy)
        return spec

    def _state(self, ctx: DraftContext) -> SuffixState:
        """The request's state, with all tokens that are known in its own tree."""
        if ctx.state is None:
            ctx.state = SuffixState(spec=self._spec(ctx.tree), shared=ctx.prompt_len)
        state: SuffixState = ctx.state
        if state.tree.num_tokens < len(ctx.token_ids):
            state.tree.extend(ctx.token_ids[state.tree.num_tokens :])
        return state

    def _propose(self, ctx: DraftContext, budget: int) -> Draft:
        state = self._state(ctx)
        spec = state.spec
        nodes = min(spec.max_nodes, budget)
        depth = min(spec.depth, nodes)
        state.forecast = None
        if depth < 1:
            return empty_draft()
        top_k = spec.top_k if isinstance(spec, DynamicTree) else 1
        own = self._grow(state.tree.match(depth), top_k, nodes)
        if own.score >= nodes:  # no tree of as many nodes can be better
            return self._calibrate(ctx, own.draft, own.matched)
        others = self._grow(self.shared.match(ctx.token_ids, horizon=depth, besides=state.key), top_k, nodes)
        best = others if others.score > own.score else own
        return self._calibrate(ctx, best.draft, best.matched)

    def _grow(self, match: Match, top_k: int, nodes: int) -> Grown:
        return grow(match, top_k=top_k, nodes=min(nodes, max(1, int(self.alpha * match.length))))


def grow(match: Match, *, top_k: int, nodes: int) -> Grown:
    """The ``nodes`` continuations that came most often, at most ``top_k`` below each node, none of a survival below
    LEAST_SURVIVAL; of equal counts the shallower first, then the lowest token id. ``top_k`` 1 gives the chain of the
    most frequent child at every step."""
    places, horizon = match.continuations.shape
    if places == 0 or nodes < 1:
        return Grown(draft=empty_draft(), score=0.0)
    rows = list(Counter(map(tuple, match.continuations.tolist())).items())
    tokens: list[int] = []
    parents: list[int] = []
    counts: list[int] = []
    waiting = _children(rows, 0, -1, top_k, LEAST_SURVIVAL * places)
    heapq.heapify(waiting)
    while waiting and len(tokens) < nodes:
        less, level, token, parent, below = heapq.heappop(waiting)
        tokens.append(token)
        parents.append(parent)
        counts.append(-less)
        if level + 1 < horizon and len(tokens) < nodes:
            for child in _children(below, level + 1, len(tokens) - 1, top_k, LEAST_SURVIVAL * places):
                heapq.heappush(waiting, child)
    survival = np.array(counts, np.float32) / np.float32(places)
    draft = Draft(
        token_ids=np.array(tokens, np.int32), parents=np.array(parents, np.int32),
        log_q=np.full(len(tokens), np.nan, np.float32), survival=survival,
    )
    return Grown(draft=draft, score=sum(counts) / places, matched=match.length)


Rows = list[tuple[tuple[int, ...], int]]  # distinct continuations and how often each came


def _children(rows: Rows, level: int, parent: int, top_k: int, least: float) -> list[tuple[int, int, int, int, Rows]]:
    """(-count, level, token, parent, its rows) of the best children; a token and its parent are one node alone, so
    that rows are never compared."""
    if len(rows) == 1:
        ((row, count),) = rows
        return [(-count, level, row[level], parent, rows)] if row[level] >= 0 and count >= least else []
    found: dict[int, Rows] = {}
    for entry in rows:
        token = entry[0][level]
        if token in found:
            found[token].append(entry)
        elif token >= 0:
            found[token] = [entry]
    counted = sorted([(-sum([count for _, count in group]), token) for token, group in found.items()])[:top_k]
    return [(less, level, token, parent, found[token]) for less, token in counted if -less >= least]
