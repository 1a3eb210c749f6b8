"""A smaller model drafts (Leviathan et al. 2211.17192).

Draft KV row i reads t_i at RoPE position i, so its rows depend on the tokens alone: no hidden state of the target is
asked for, and what was computed while drafting stays right once its tokens are accepted. With root t_n the rows 0..n
are there; row n's logits predict t_{n+1}. While a tree grows, an expanded node at depth d reads its token at position
n+d, its KV in a scratch slot behind row n. After a verification the accepted nodes' rows are moved together, and what
is missing (the new root, and an accepted node that was never expanded) is computed in one forward over all sequences.

Where the draft model's context ends, drafting ends: a root at or beyond it gets empty drafts, counted in the sequence's
``metrics["beyond_draft_context"]``; rows stop at that length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from pdspec.cache.paged import PagedCache
from pdspec.errors import TransferDamaged
from pdspec.model.fingerprint import content_fingerprint
from pdspec.model.runner import Runner
from pdspec.spec.draft_rows import DraftRows, pack_rows
from pdspec.spec.growth import Growth, Ranked, width
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.survival import Forecast
from pdspec.spec.tree import TreeSpec
from pdspec.spec.tree_drafter import TreeDrafter
from pdspec.types import CacheGroup

CHUNK = 512  # prompt rows of one forward
BEYOND = "beyond_draft_context"


@dataclass(kw_only=True)
class ModelState:
    """A sequence's part. ``logits`` [1, V] are of the last row, ``expanded`` maps (slot of the parent, token) to the
    slot of a node that was expanded in the last proposal; see ``TreeState`` for the rest."""

    spec: TreeSpec
    rows: int  # rows of committed tokens
    logits: torch.Tensor | None = None
    candidates: Candidates | None = None
    first: Ranked | None = None
    expanded: dict[tuple[int, int], int] = field(default_factory=dict)
    forecast: Forecast | None = None


class ModelDrafter(TreeDrafter):
    """``runner`` over its group of ``cache``; ``target_ids`` int64 [draft vocabulary] are the ids of its logits,
    further ones are padding. An id that only the target's padding has is read as the draft model's last."""

    capture: tuple[int, ...] = ()
    ahead = carry = 0
    stable_kv = True
    want_final = False

    def __init__(
        self, runner: Runner, cache: PagedCache, *, target_ids: torch.Tensor, content_hash: str,
        tree: str = "chain(4)", max_nodes: int = 64,
    ) -> None:
        super().__init__("draft_model", target_ids=target_ids, tree=tree, max_nodes=max_nodes)
        self.runner, self.cache = runner, cache
        self.groups: tuple[CacheGroup, ...] = (cache.layout(runner.group.name),)
        self.max_positions = runner.config.max_context
        content = content_fingerprint(runner.config, content_hash, runner.dtype, self.groups)
        ids = xxhash.xxh3_128_hexdigest(target_ids.numpy().data)
        known = f"draft_model/2 {content} {ids} {self.max_positions}"
        self._fingerprint = xxhash.xxh3_128_hexdigest(known.encode())

    def fingerprint(self) -> str:
        """Hash of weights, geometry, context, draft vocabulary and compute dtype."""
        return self._fingerprint

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """The root has a row, too; none lies beyond the draft model's context."""
        return {self.groups[0].name: min(num_tokens + 1, self.max_positions)}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Writes the rows up to the token behind the chunk, as far as it is known. A chunk at 0 begins anew; a first
        chunk elsewhere stands behind rows that are in the pages already. Raises ValueError for chunks out of order."""
        state = ctx.state
        if state is None or hidden.start == 0:
            state = ctx.state = ModelState(spec=self._spec(ctx.tree), rows=min(hidden.start, self.max_positions))
        if state.rows not in range(min(hidden.start, self.max_positions), hidden.start + 2):
            raise ValueError(f"tokens {hidden.start}.. when {state.rows} draft rows are made")
        stop = min(hidden.start + hidden.num_rows + 1, len(ctx.token_ids), self.max_positions)
        while state.rows < stop:
            end = min(stop, state.rows + CHUNK)
            last = end == len(ctx.token_ids) > ctx.prompt_len
            rows = DraftRows.committed(ctx, ctx.token_ids[state.rows : end], state.rows)
            logits = self._forward([rows], [end - state.rows - 1] if last else [])
            state.rows, state.logits = end, logits if last else None
            state.candidates = state.first = None

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """The W = max(16, tree width) best first tokens, none beyond the draft model's context. Raises ValueError
        before the prefill is complete."""
        if self._beyond(ctx):
            return None, {}
        state = self._state(ctx)
        if state.logits is None:
            raise ValueError(f"{ctx.request_id}: the last draft row has no logits")
        with torch.inference_mode():
            state.candidates = self._candidates(ctx, state.spec, state.logits)
        return state.candidates, {}

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Takes over what ``start`` gave elsewhere. Raises TransferDamaged when it is not that."""
        spec = self._spec(ctx.tree)
        due = 0 if self._beyond(ctx) else self._width(spec)
        found = 0 if candidates is None else len(candidates.token_ids)
        if found != due:
            raise TransferDamaged(f"{found} first draft tokens, {due} are expected", field="draft_start",
                                  remedy="let the decode worker rebuild the draft state")
        have = min(ctx.root_position + 1, self.max_positions)
        ctx.state = ModelState(spec=spec, rows=have, candidates=candidates)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """One tree each; see ``TreeDrafter._grown``."""
        growths = []
        with torch.inference_mode():
            for ctx, budget in zip(batch, budgets, strict=True):
                if self._beyond(ctx):
                    ctx.metrics[BEYOND] = ctx.metrics.get(BEYOND, 0.0) + 1.0
                    budget = 0
                else:
                    self._find_first(ctx, budget)
                growths.append(self._growth(ctx, budget, max(0, self.max_positions - ctx.root_position)))

            def expand(level: int, frontiers: Mapping[int, Sequence[int]]) -> torch.Tensor:
                rows = [self._nodes(batch[i], growths[i], nodes, level) for i, nodes in frontiers.items()]
                return self._forward(rows, range(sum(map(len, frontiers.values()))))

            return self._grown(batch, growths, expand)

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Keeps the rows of accepted nodes and computes those of the other new tokens, in one forward. Raises
        ValueError for a verdict that does not lead from the rows that are there to the root."""
        waiting = []
        for ctx, verdict, _ in batch:
            state: ModelState = ctx.state
            old = ctx.root_position - verdict.num_accepted  # rows when the root before stood last
            if state is None or state.rows != min(old, self.max_positions):
                rows = None if state is None else state.rows
                raise ValueError(f"{rows} draft rows, {verdict.num_accepted} accepted, root at {ctx.root_position}")
            self._keep(ctx, ctx.token_ids[old : ctx.root_position])
            state.logits = state.candidates = state.first = None
            if not self._beyond(ctx):
                waiting.append(DraftRows.committed(ctx, ctx.token_ids[state.rows :], state.rows))
            else:
                state.rows = min(ctx.root_position + 1, self.max_positions)  # nothing reads them any more
        self._learn(batch)
        if not waiting:
            return
        logits = self._forward(waiting, np.cumsum([len(one.slots) for one in waiting]) - 1)
        for one, row in zip(waiting, logits.split(1), strict=True):
            one.ctx.state.rows, one.ctx.state.logits = one.ctx.root_position + 1, row

    def _keep(self, ctx: DraftContext, accepted: Sequence[int]) -> None:
        """Makes the rows of those ``accepted`` tokens that were expanded contiguous."""
        state: ModelState = ctx.state
        source: list[int] = []
        parent = -1
        for token in accepted:
            if (parent, token) not in state.expanded:
                break
            parent = state.expanded[parent, token]
            source.append(parent)
        wanted = list(range(state.rows, state.rows + len(source)))
        if source != wanted:
            self.cache.copy_rows(self.groups[0].name, ctx.pages, source, wanted)
        state.rows += len(source)
        state.expanded = {}

    def _beyond(self, ctx: DraftContext) -> bool:
        return ctx.root_position >= self.max_positions

    def _state(self, ctx: DraftContext) -> ModelState:
        state = ctx.state
        if state is None or state.rows != ctx.root_position + 1:
            rows = None if state is None else state.rows
            raise ValueError(f"{ctx.request_id}: {rows} draft rows with the root at {ctx.root_position}")
        return state

    def _find_first(self, ctx: DraftContext, budget: int) -> None:
        """First children, where there are none yet: those that were shipped, or the best by the last row's logits."""
        state = self._state(ctx)
        state.expanded = {}
        if state.first is None and budget > 0:
            if state.candidates is not None:
                state.first = self._shipped(ctx, state.spec, state.candidates)
            elif state.logits is not None:
                state.first = self._rank(ctx, state.logits, 1, width(state.spec))

    def _nodes(self, ctx: DraftContext, growth: Growth, nodes: Sequence[int], depth: int) -> DraftRows:
        state: ModelState = ctx.state
        paths = [[state.rows + number for number in growth.path(node)] for node in nodes]
        tokens = [growth.token(node) for node in nodes]
        for token, path in zip(tokens, paths, strict=True):
            state.expanded[path[-2] if len(path) > 1 else -1, token] = path[-1]
        return DraftRows(ctx=ctx, token_ids=tokens, positions=[ctx.root_position + depth] * len(nodes),
                         slots=[path[-1] for path in paths], prefix=[state.rows] * len(nodes), paths=paths)

    def _forward(self, rows: Sequence[DraftRows], wanted: Sequence[int] | np.ndarray) -> torch.Tensor:
        """One forward over the rows of several sequences; logits [len(wanted), vocabulary] of the rows ``wanted``."""
        batch = pack_rows(rows, self.cache.page_size, np.array(wanted, np.int32))
        np.minimum(batch.token_ids, self.runner.config.vocab_size - 1, out=batch.token_ids)
        return self.runner.forward(batch, self.cache).logits[:, : len(self._ids)]
