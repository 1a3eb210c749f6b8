"""Drafters that continue the target's features with a layer of their own: EAGLE-1, EAGLE-2 and EAGLE-3.

Draft KV row i reads the target's features h_i and the token t_{i+1}, at RoPE position i; its output predicts t_{i+2}.
With root t_n the rows 0..n-1 are committed; their slots are their indices. While a tree grows, an expanded node at
depth d (it stands for absolute position n+d) is row n+d-1: RoPE position n+d-1, feature = its parent's output, KV in a
scratch slot after the committed rows. After a verification with a accepted drafts the rows n..n+a are committed:

    stable_kv   (the default; SafeAILab's way) all are made anew from the target's features, over the scratch
    unstable    rows that the tree made of accepted nodes are kept, moved to their place; only what it never made comes
                from the target's features: rows of nodes that were not expanded, and always row n+a, which reads
                t_{n+a+1} and whose output the next draft begins with

With first-token padding every row moves up by one: row i reads h_{i-1} and t_i, row 0 a feature of zeros and t_0, and
with root t_n there are n+1 rows; each token then has its draft row where it has its target row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import TransferDamaged
from pdspec.spec.draft_rows import DraftRows, pack_rows
from pdspec.spec.feature_rows import FeatureModel, FeatureState
from pdspec.spec.growth import Growth
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.tree_drafter import TreeDrafter
from pdspec.types import CacheGroup


class FeatureDrafter(TreeDrafter):
    """``model`` over the pages of ``cache``, in cache group ``group``; ``target_ids`` int64 [draft vocabulary] are the
    target ids of its draft ids; ``tree`` is drafted where a request names none. ``capture`` are the target layers
    whose inputs ``model.features`` reads, ``want_final`` says that it reads the final hidden state.

    ``target_matches`` is False when the head was made for other weights of this geometry. A request's tree may have
    ``max_nodes`` nodes and expand as many. ``stable_kv`` and ``padding`` (of the first token) as above; nodes whose
    path has a probability below ``threshold`` are neither expanded nor kept.
    """

    def __init__(
        self, name: str, model: FeatureModel, cache: PagedCache, *, group: str, target_ids: torch.Tensor,
        fingerprint: str, tree: str, capture: tuple[int, ...] = (), want_final: bool = False, max_nodes: int = 64,
        target_matches: bool = True, stable_kv: bool = True, padding: bool = False, threshold: float = 0.0,
    ) -> None:
        super().__init__(name, target_ids=target_ids, tree=tree, max_nodes=max_nodes)
        self.model, self.target_matches = model, target_matches
        self.stable_kv, self.threshold = stable_kv, threshold
        self._padding = int(padding)  # rows before the one that reads h_0
        self.carry, self.ahead = 1, 1 - self._padding
        self.capture, self.want_final = capture, want_final
        self.groups: tuple[CacheGroup, ...] = (cache.layout(group),)
        self._cache = cache
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        """Hash of weights, geometry, vocabulary map, padding and compute dtype."""
        return self._fingerprint

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """As many rows as tokens before the root, one more with first-token padding."""
        return {self.groups[0].name: num_tokens + self._padding}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Writes the rows whose features and next token are known; the last row waits for t_n. A chunk at 0 begins
        anew; a first chunk elsewhere stands behind rows that are in the pages already. Raises ValueError for chunks
        out of order."""
        state = ctx.state
        if state is None or hidden.start == 0:
            rows = hidden.start + self._padding if hidden.start else 0
            state = ctx.state = FeatureState(spec=self._spec(ctx.tree), rows=rows)
        with torch.inference_mode():
            features = self.model.features(hidden)
            if hidden.start == 0 and self._padding:
                state.waiting = features.new_zeros(1, features.shape[1])
            held = 0 if state.waiting is None else len(state.waiting)
            if state.waiting is not None:
                features = torch.cat((state.waiting, features))
            due = self._due(ctx)
            known = min(state.rows + len(features), due) - state.rows
            if hidden.start + self._padding != state.rows + held or not 0 <= len(features) - known <= 1:
                raise ValueError(f"hidden rows {hidden.start}.. when {state.rows} draft rows are made, {held} waits and"
                                 f" the root is at {ctx.root_position}")
            state.waiting = features[known:].clone() if len(features) > known else None
            if known == 0:
                return
            last = state.rows + known == due
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
        ctx.state = FeatureState(spec=spec, rows=self._due(ctx), feature=feature, candidates=candidates)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """One tree each; see ``TreeDrafter._grown``."""
        states = [self._state(ctx) for ctx in batch]
        with torch.inference_mode():
            self._find_first([ctx for ctx, budget in zip(batch, budgets, strict=True) if budget > 0])
            deepest = [max(1, self.model.max_positions - self._due(ctx) + 1) for ctx in batch]
            growths = [self._growth(*one) for one in zip(batch, budgets, deepest, strict=True)]
            for state in states:
                state.made = {}
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
        """Makes the rows of the root and the accepted path final in one forward. Raises ValueError when ``hidden`` is
        not of these rows."""
        rows, parts = [], []
        for ctx, verdict, hidden in batch:
            state, count = ctx.state, verdict.num_accepted + 1
            start = state.rows - self._padding
            if hidden.start != start or hidden.num_rows != count or state.rows + count != self._due(ctx):
                raise ValueError(f"hidden rows {hidden.start}..+{hidden.num_rows} after {verdict.num_accepted}"
                                 f" accepted, {state.rows} draft rows, root at {ctx.root_position}")
            kept = self._keep(ctx, verdict)
            rows.append(self._committed(ctx, state.rows + kept, count - kept))
            parts.append(hidden.after(kept))
        if not batch:
            return
        self._learn(batch)
        with torch.inference_mode():
            features = self.model.features(HiddenRows.joined(parts))
            ends = np.cumsum([len(one.slots) for one in rows]) - 1
            output = self._forward(rows, features, ends)
            for (ctx, _, _), feature in zip(batch, output.split(1), strict=True):
                state = ctx.state
                state.rows, state.feature, state.candidates, state.first = self._due(ctx), feature, None, None
                state.made = {}

    def _due(self, ctx: DraftContext) -> int:
        """Draft rows that are known with the root where it is."""
        return ctx.root_position + self._padding

    def _keep(self, ctx: DraftContext, verdict: Verdict) -> int:
        """Where KV is unstable: how many accepted nodes' rows the tree has made; they are moved to their place."""
        state, source = ctx.state, []
        for depth in range(1, verdict.num_accepted + 1):
            slot = state.made.get(verdict.output_ids[:depth])
            if slot is None:
                break
            source.append(slot)
        wanted = list(range(state.rows, state.rows + len(source)))
        if source != wanted:
            self._cache.copy_rows(self.groups[0].name, ctx.pages, source, wanted)
        return len(source)

    def _state(self, ctx: DraftContext) -> FeatureState:
        state = ctx.state
        if state is None or state.feature is None or state.rows != self._due(ctx):
            rows = None if state is None else state.rows
            raise ValueError(f"{ctx.request_id}: {rows} draft rows with the root at {ctx.root_position}")
        return state

    def _find_first(self, batch: Sequence[DraftContext]) -> None:
        """First children of the sequences that have none yet: those that were shipped, the others by one product over
        all of them."""
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
        for ctx, first in zip(missing, self._rank_each(missing, [1] * len(missing), logits, 1), strict=True):
            ctx.state.first = first

    def _committed(self, ctx: DraftContext, first: int, count: int) -> DraftRows:
        token = first + 1 - self._padding
        return DraftRows.committed(ctx, ctx.token_ids[token : token + count], first)

    def _nodes(self, ctx: DraftContext, growth: Growth, frontier: Sequence[int], depth: int) -> DraftRows:
        base = ctx.state.rows
        paths = [[base + number for number in growth.path(node)] for node in frontier]
        if not self.stable_kv:
            for node, path in zip(frontier, paths, strict=True):
                ctx.state.made[growth.tokens(node)] = path[-1]
        return DraftRows(ctx=ctx, token_ids=[growth.token(node) for node in frontier],
                         positions=[base + depth - 1] * len(frontier), slots=[path[-1] for path in paths],
                         prefix=[base] * len(frontier), paths=paths)

    def _forward(self, rows: Sequence[DraftRows], features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """One forward over the rows of several sequences; see ``FeatureModel.forward``."""
        return self.model.forward(pack_rows(rows, self._cache.page_size), features, outputs)
