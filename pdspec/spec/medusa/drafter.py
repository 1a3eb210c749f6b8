"""Medusa as a drafter: head k drafts depth k + 1 of the tree from one hidden state, whatever the path.

With root t_n the state is h_{n-1} after the target's final norm, the hidden state that t_n came from; head k (from 0)
predicts t_{n+1+k}, depth k + 1. So a tree is a product: the nodes of one depth have the same children, by the noise of
that depth's position, and under ``rejection`` the same law. There is no draft KV and no forward per level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from pdspec.errors import InvalidRequest, TransferDamaged
from pdspec.spec.growth import NO_CHILDREN, Growth, Ranked, width
from pdspec.spec.medusa.checkpoint import Heads
from pdspec.spec.medusa.head import MedusaHeads
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.survival import Forecast, Kind
from pdspec.spec.tree import TreeSpec, parse_tree
from pdspec.spec.tree_drafter import TreeDrafter
from pdspec.types import CacheGroup


@dataclass(kw_only=True)
class MedusaState:
    """A sequence's part. ``hidden`` [1, H] is the last of ``rows`` target rows that were seen; ``candidates`` are what
    crossed the handoff, until the next verification."""

    spec: TreeSpec
    rows: int
    hidden: torch.Tensor | None = None
    candidates: Candidates | None = None
    forecast: Forecast | None = None


class MedusaDrafter(TreeDrafter):
    """``heads`` run by ``model``; ``tree`` is drafted where a request names none (cut to the heads there are).
    ``target_matches`` is False when they were made for other weights of this geometry."""

    groups: tuple[CacheGroup, ...] = ()
    capture: tuple[int, ...] = ()
    ahead = carry = 0
    stable_kv = True
    want_final = True

    def __init__(
        self, heads: Heads, model: MedusaHeads, *, dtype: str, tree: str = "chain(2)", max_nodes: int = 64,
        target_matches: bool = True,
    ) -> None:
        self.model, self.target_matches = model, target_matches
        self.num_heads = heads.config.num_heads
        self._fingerprint = xxhash.xxh3_128_hexdigest(f"medusa/1 {heads.fingerprint()} {dtype}".encode())
        tree = tree if parse_tree(tree).depth <= self.num_heads else f"chain({self.num_heads})"
        super().__init__("medusa", target_ids=heads.target_ids, tree=tree, max_nodes=max_nodes)

    def fingerprint(self) -> str:
        """Hash of weights, geometry, vocabulary map and compute dtype; shared output rows are the target's."""
        return self._fingerprint

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """No groups."""
        return {}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Keeps the last row. A chunk at 0 begins anew; a first chunk may stand anywhere. Raises ValueError for chunks
        out of order or without the final hidden state."""
        state = ctx.state
        if state is None or hidden.start == 0:
            state = ctx.state = MedusaState(spec=self._spec(ctx.tree), rows=hidden.start)
        if hidden.final is None or hidden.start != state.rows:
            final = hidden.final is not None
            raise ValueError(f"hidden rows {hidden.start}.. after {state.rows}, with the final state: {final}")
        self._see(state, hidden.final, hidden.num_rows)

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """The W = max(16, tree width) best first tokens and ``hidden`` [1, H], which is h_{n-1}. Raises ValueError
        before the prefill is complete."""
        state, hidden = self._state(ctx)
        with torch.inference_mode():
            state.candidates = self._candidates(ctx, state.spec, self.model.logits(hidden, 0))
        return state.candidates, {"hidden": hidden.float().cpu()}

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Takes over what ``start`` gave elsewhere. Raises TransferDamaged when it is not that."""
        spec, hidden = self._spec(ctx.tree), rows.get("hidden")
        expected, found = (1, self.model.config.hidden_size), 0 if candidates is None else len(candidates.token_ids)
        if hidden is None or tuple(hidden.shape) != expected or candidates is None or found != self._width(spec):
            shape = None if hidden is None else list(hidden.shape)
            raise TransferDamaged(
                f"{found} first draft tokens and a hidden row of shape {shape}; {self._width(spec)} and"
                f" {list(expected)} are expected", field="draft_start",
                remedy="let the decode worker rebuild the draft state",
            )
        hidden = hidden.to(self.model.ops.device, torch.float32).contiguous()
        ctx.state = MedusaState(spec=spec, rows=ctx.root_position, hidden=hidden, candidates=candidates)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """One tree each; every head runs once over all sequences that draft as deep."""
        found = [self._state(ctx) for ctx in batch]
        depths = [
            min(state.spec.depth, budget, ctx.deepest)
            for ctx, (state, _), budget in zip(batch, found, budgets, strict=True)
        ]
        with torch.inference_mode():
            levels = self._levels(batch, [hidden for _, hidden in found], depths)
            return [
                self._grow(ctx, budget, ranked) for ctx, budget, ranked in zip(batch, budgets, levels, strict=True)
            ]

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Keeps the hidden state that the new root came from. Raises ValueError when ``hidden`` is not of the root and
        the accepted path."""
        for ctx, verdict, hidden in batch:
            state, count = ctx.state, verdict.num_accepted + 1
            rows = (hidden.start, hidden.num_rows, state.rows + count)
            if hidden.final is None or rows != (state.rows, count, ctx.root_position):
                raise ValueError(f"hidden rows {hidden.start}..+{hidden.num_rows} after {verdict.num_accepted}"
                                 f" accepted, {state.rows} seen, root at {ctx.root_position}")
            self._see(state, hidden.final, count)
        self._learn(batch)

    def _spec(self, tree: str) -> TreeSpec:
        spec = parse_tree(tree or self.default_tree)
        if spec.depth > self.num_heads or spec.max_nodes > self.max_nodes:
            raise InvalidRequest(
                f"drafter {self.name} cannot draft {tree}: {spec.depth} levels, {spec.max_nodes} nodes", field="tree",
                remedy=f"keep to {self.num_heads} levels, one for each head, and {self.max_nodes} nodes",
            )
        return spec

    def _see(self, state: MedusaState, final: torch.Tensor, count: int) -> None:
        state.rows += count
        if count:
            state.hidden = final[count - 1 : count].to(self.model.ops.device, torch.float32, copy=True)
            state.candidates = None

    def _state(self, ctx: DraftContext) -> tuple[MedusaState, torch.Tensor]:
        state: MedusaState | None = ctx.state
        if state is None or state.hidden is None or state.rows != ctx.root_position:
            rows = None if state is None else state.rows
            raise ValueError(f"{ctx.request_id}: {rows} target rows seen with the root at {ctx.root_position}")
        return state, state.hidden

    def _levels(
        self, batch: Sequence[DraftContext], hidden: Sequence[torch.Tensor], depths: Sequence[int]
    ) -> list[list[Ranked]]:
        """The children at depth 1, 2, … of each sequence, as deep as ``depths``; one row each."""
        levels: list[list[Ranked]] = [[] for _ in batch]
        for depth in range(1, max(depths, default=0) + 1):
            shipped = [ctx.state.candidates is not None and depth == 1 for ctx in batch]
            active = [i for i in range(len(batch)) if depths[i] >= depth and not shipped[i]]
            rows = torch.cat([hidden[i] for i in active]) if active else hidden[0][:0]
            logits = dict(zip(active, self.model.logits(rows, depth - 1).split(1), strict=True)) if active else {}
            for i, ctx in enumerate(batch):
                if depths[i] >= depth:
                    levels[i].append(self._level(ctx, logits.get(i), depth))
        return levels

    def _level(self, ctx: DraftContext, logits: torch.Tensor | None, depth: int) -> Ranked:
        """The children at ``depth``; without logits those that were shipped."""
        state: MedusaState = ctx.state
        if logits is None:
            assert state.candidates is not None
            return self._shipped(ctx, state.spec, state.candidates)
        return self._rank(ctx, logits, depth, self._width(state.spec) if depth == 1 else width(state.spec))

    def _grow(self, ctx: DraftContext, budget: int, levels: Sequence[Ranked]) -> Draft:
        """The product of the levels, as far as the tree's shape and the budget go."""
        growth = Growth(ctx.state.spec, budget, levels[0] if levels else NO_CHILDREN, len(levels),
                        calibration=self.survival.calibration(Kind.of(ctx.sampling)))
        for level in levels[1:]:
            if not (nodes := growth.frontier()):
                break
            growth.add(nodes, _repeated(level, len(nodes)))
        return self._draft(ctx, growth)


def _repeated(level: Ranked, count: int) -> Ranked:
    return Ranked(
        token_ids=np.repeat(level.token_ids, count, 0), log_q=np.repeat(level.log_q, count, 0),
        score=np.repeat(level.score, count, 0), laws=level.laws * count,
    )
