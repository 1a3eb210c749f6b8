"""Drafters that continue the target's features with a layer of their own: EAGLE-1, EAGLE-2 and EAGLE-3.

Draft KV row i reads the target's features h_i and the token t_{i+1}, at RoPE position i; its output predicts t_{i+2}.
With root t_n the rows 0..n-1 are committed; their slots are their indices. While a tree grows, an expanded node at
depth d (it stands for absolute position n+d) is row n+d-1: RoPE position n+d-1, feature = its parent's output, KV in a
scratch slot after the committed rows. After a verification the rows of the accepted tokens are made anew from the
target's features (``stable_kv``), over the scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import TransferDamaged
from pdspec.model.batch import ForwardBatch
from pdspec.spec.draft_rows import DraftRows, pack_rows
from pdspec.spec.growth import Growth, Ranked
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.tree import TreeSpec
from pdspec.spec.tree_drafter import TreeDrafter
from pdspec.types import CacheGroup


class FeatureModel(Protocol):
    """A head's forward pass over draft KV pages (``eagle3/head.py``). ``config`` has ``hidden_size`` H; the ``group``
    holds its KV rows."""

    ops: Any
    config: Any
    max_positions: int

    def features(self, hidden: HiddenRows) -> torch.Tensor:
        """What rows read of the target: [R, H]. Raises ValueError where it was not captured."""

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """Writes the KV rows of all R rows; the layer's output [len(outputs), H] of the rows ``outputs``."""

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, draft vocabulary] float32 of outputs [R, H]."""


@dataclass(kw_only=True)
class FeatureState:
    """A sequence's part. ``feature`` [1, H] is the output of the last committed row, ``waiting`` [1 or 0, H] the
    features of the row whose token is not known yet. ``candidates`` are what crosses the handoff, ``first`` the first
    children of the next tree; both are made when first needed."""

    spec: TreeSpec
    rows: int  # committed draft rows
    waiting: torch.Tensor | None = None
    feature: torch.Tensor | None = None
    candidates: Candidates | None = None
    first: Ranked | None = None


class FeatureDrafter(TreeDrafter):
    """``model`` over the pages of ``cache``, in cache group ``group``; ``target_ids`` int64 [draft vocabulary] are the
    target ids of its draft ids; ``tree`` is drafted where a request names none. ``capture`` are the target layers
    whose inputs ``model.features`` reads, ``want_final`` says that it reads the final hidden state.

    ``target_matches`` is False when the head was made for other weights of this geometry. A request's tree may have
    ``max_nodes`` nodes and expand as many.
    """

    def __init__(
        self, name: str, model: FeatureModel, cache: PagedCache, *, group: str, target_ids: torch.Tensor,
        fingerprint: str, tree: str, capture: tuple[int, ...] = (), want_final: bool = False, max_nodes: int = 64,
        target_matches: bool = True,
    ) -> None:
        super().__init__(name, target_ids=target_ids, tree=tree, max_nodes=max_nodes)
        self.model, self.target_matches = model, target_matches
        self.capture, self.want_final = capture, want_final
        self.groups: tuple[CacheGroup, ...] = (cache.layout(group),)
        self._page_size = cache.page_size
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        """Hash of weights, geometry, vocabulary map, padding and compute dtype."""
        return self._fingerprint

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """As many rows as tokens before the root."""
        return {self.groups[0].name: num_tokens}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Writes the rows whose features and next token are known; the last row waits for t_n. A chunk at 0 begins
        anew; a first chunk elsewhere stands behind rows that are in the pages already. Raises ValueError for chunks
        out of order."""
        state = ctx.state
        if state is None or hidden.start == 0:
            state = ctx.state = FeatureState(spec=self._spec(ctx.tree), rows=hidden.start)
        with torch.inference_mode():
            features = self.model.features(hidden)
            held = 0 if state.waiting is None else len(state.waiting)
            if state.waiting is not None:
                features = torch.cat((state.waiting, features))
            known = min(state.rows + len(features), ctx.root_position) - state.rows
            if hidden.start != state.rows + held or not 0 <= len(features) - known <= 1:
                raise ValueError(f"hidden rows {hidden.start}.. when {state.rows} draft rows are made, {held} waits and"
                                 f" the root is at {ctx.root_position}")
            state.waiting = features[known:].clone() if len(features) > known else None
            if known == 0:
                return
            last = state.rows + known == ctx.root_position
            output = self._forward([self._committed(ctx, state.rows, known)], features[:known],
                                   np.arange(known - 1, known) if last else np.empty(0, np.int64))
            state.rows += known
            state.feature, state.candidates, state.first = (output if last else None), None, None

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """The W = max(16, tree width) best first tokens and the last row's output, ``feature`` [1, H]. Raises
        ValueError before the prefill is complete."""
        state = self._state(ctx)
        assert state.feature is not None
        with torch.inference_mode():
            state.candidates = self._candidates(ctx, state.spec, self.model.logits(state.feature))
        return state.candidates, {"feature": state.feature.float().cpu()}

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Takes over what ``start`` gave elsewhere. Raises TransferDamaged when it is not that."""
        spec, feature = self._spec(ctx.tree), rows.get("feature")
        hidden, found = self.model.config.hidden_size, 0 if candidates is None else len(candidates.token_ids)
        if feature is None or tuple(feature.shape) != (1, hidden) or candidates is None or found != self._width(spec):
            shape = None if feature is None else list(feature.shape)
            raise TransferDamaged(
                f"{found} first draft tokens and a feature of shape {shape}; {self._width(spec)} and {[1, hidden]}"
                " are expected", field="draft_start", remedy="let the decode worker rebuild the draft state",
            )
        feature = feature.to(self.model.ops.device, torch.float32).contiguous()
        ctx.state = FeatureState(spec=spec, rows=ctx.root_position, feature=feature, candidates=candidates)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """One tree each; see ``TreeDrafter._grown``."""
        states = [self._state(ctx) for ctx in batch]
        with torch.inference_mode():
            self._find_first([ctx for ctx, budget in zip(batch, budgets, strict=True) if budget > 0])
            deepest = [max(1, self.model.max_positions - ctx.root_position + 1) for ctx in batch]
            growths = [self._growth(*one) for one in zip(batch, budgets, deepest, strict=True)]
            outputs = [{-1: state.feature} for state in states]  # of the nodes expanded last, [1, H]

            def expand(level: int, frontiers: Mapping[int, Sequence[int]]) -> torch.Tensor:
                rows = [self._nodes(batch[i], growths[i], nodes, level) for i, nodes in frontiers.items()]
                parents = [outputs[i][growths[i].parent(node)] for i, nodes in frontiers.items() for node in nodes]
                features = torch.cat([feature for feature in parents if feature is not None])
                output = self._forward(rows, features, np.arange(len(features)))
                each = iter(output.split(1))
                for i, nodes in frontiers.items():
                    outputs[i] = {node: next(each) for node in nodes}
                return self.model.logits(output)

            return self._grown(batch, growths, expand)

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Rebuilds the rows of the root and the accepted path in one forward. Raises ValueError when ``hidden`` is not
        of these rows."""
        rows = []
        for ctx, verdict, hidden in batch:
            state, count = ctx.state, verdict.num_accepted + 1
            if hidden.start != state.rows or hidden.num_rows != count or state.rows + count != ctx.root_position:
                raise ValueError(f"hidden rows {hidden.start}..+{hidden.num_rows} after {verdict.num_accepted}"
                                 f" accepted, {state.rows} draft rows, root at {ctx.root_position}")
            rows.append(self._committed(ctx, state.rows, count))
        if not batch:
            return
        with torch.inference_mode():
            features = self.model.features(HiddenRows.joined([hidden for _, _, hidden in batch]))
            ends = np.cumsum([len(one.slots) for one in rows]) - 1
            output = self._forward(rows, features, ends)
            for (ctx, _, _), feature in zip(batch, output.split(1), strict=True):
                state = ctx.state
                state.rows, state.feature, state.candidates, state.first = ctx.root_position, feature, None, None

    def _state(self, ctx: DraftContext) -> FeatureState:
        state = ctx.state
        if state is None or state.feature is None or state.rows != ctx.root_position:
            rows = None if state is None else state.rows
            raise ValueError(f"{ctx.request_id}: {rows} draft rows with the root at {ctx.root_position}")
        return state

    def _find_first(self, batch: Sequence[DraftContext]) -> None:
        """First children of the sequences that have none yet: those that were shipped, the others by one product over
        all of them and then each for itself."""
        missing = []
        for ctx in batch:
            state: FeatureState = ctx.state
            if state.first is None and state.candidates is not None:
                state.first = self._shipped(ctx, state.spec, state.candidates)
            elif state.first is None:
                missing.append(ctx)
        if not missing:
            return
        logits = self.model.logits(torch.cat([ctx.state.feature for ctx in missing]))
        for ctx, row in zip(missing, logits.split(1), strict=True):
            ctx.state.first = self._rank(ctx, row, 1, self._width(ctx.state.spec))

    def _committed(self, ctx: DraftContext, first: int, count: int) -> DraftRows:
        return DraftRows.committed(ctx, ctx.token_ids[first + 1 : first + count + 1], first)

    def _nodes(self, ctx: DraftContext, growth: Growth, frontier: Sequence[int], depth: int) -> DraftRows:
        base = ctx.state.rows
        paths = [[base + number for number in growth.path(node)] for node in frontier]
        return DraftRows(ctx=ctx, token_ids=[growth.token(node) for node in frontier],
                         positions=[ctx.root_position + depth - 1] * len(frontier), slots=[path[-1] for path in paths],
                         prefix=[base] * len(frontier), paths=paths)

    def _forward(self, rows: Sequence[DraftRows], features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """One forward over the rows of several sequences; see ``Eagle3Head.forward``."""
        return self.model.forward(pack_rows(rows, self._page_size), features, outputs)
