"""The target drafts for itself over a sparse view of its own KV (MagicDec, 2408.11049).

With the root at position n the target's rows 0..n-1 are committed. A draft row sees some of them (``View``: sink,
window, chosen prompt rows), then the root and its own path:

    slot      0 .. sink-1 │ (chosen) │ n-window .. n-1 │ n: root │ n+1+k: the k-th expanded node
    seen as   prefix      │ ancestors ──────────────────────────────────────────────────────────▶

The root's row and the nodes' are made sparsely in slots n, n+1, ..., which the verification writes anew before it reads
them: its own rows stand at n (root) and n+1+i (node i), and no row of it sees any other slot from n on. So a sparse row
never becomes part of the answer, and nothing is to be rolled back here. Where the view has every row, drafting *is*
plain decoding and everything is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from pdspec.cache.paged import PagedCache
from pdspec.errors import TransferDamaged
from pdspec.model.runner import Runner
from pdspec.spec.draft_rows import DraftRows, pack_rows
from pdspec.spec.growth import Growth, Ranked, width
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.sparse.config import Ints, View
from pdspec.spec.sparse.select import choose_rows
from pdspec.spec.survival import Forecast
from pdspec.spec.tree import TreeSpec
from pdspec.spec.tree_drafter import TreeDrafter
from pdspec.types import CacheGroup

SELECTED = "selected"  # the row of DraftStart: [1, K] float32, whole numbers (exact below 2^24)


@dataclass(kw_only=True)
class SparseState:
    """A sequence's part: the prompt rows that are always seen; ``prefix`` and ``seen`` are the view of the proposal at
    hand (``View.rows``)."""

    spec: TreeSpec
    selected: Ints
    prefix: int = 0
    seen: Ints
    candidates: Candidates | None = None  # never: the root's row is needed anyway
    first: Ranked | None = None
    forecast: Forecast | None = None


class SparseDrafter(TreeDrafter):
    """``runner`` is the target's, over the target's group of ``cache``."""

    groups: tuple[CacheGroup, ...] = ()
    capture: tuple[int, ...] = ()
    ahead = carry = 0
    stable_kv = True
    want_final = False

    def __init__(
        self, runner: Runner, cache: PagedCache, view: View, *, tree: str = "chain(4)", max_nodes: int = 64
    ) -> None:
        vocabulary = torch.arange(runner.config.vocab_size)
        super().__init__("sparse", target_ids=vocabulary, tree=tree, max_nodes=max_nodes)
        self.runner, self.cache, self.view = runner, cache, view

    def fingerprint(self) -> str:
        """Of what is shipped: nothing but the choice of prompt rows, where there is one."""
        choice = f"snapkv {self.view.budget}" if self.view.select == "snapkv" else "nothing"
        return xxhash.xxh3_128_hexdigest(f"sparse/1 {choice}".encode())

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """No groups."""
        return {}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Nothing: the target's prefill is its own."""

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """The chosen prompt rows, ``selected`` [1, K] float32, K = min(budget, n); without a choice nothing. The
        prompt's target KV must be in the pages, with 32 slots behind it."""
        count = self.view.num_selected(ctx.prompt_len)
        if not count:
            return None, {}
        chosen = choose_rows(self.runner, self.cache, ctx, count)
        return None, {SELECTED: torch.from_numpy(chosen.astype(np.float32))[None]}

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Takes over the choice. Raises TransferDamaged when it is not one of K ascending prompt rows."""
        count = self.view.num_selected(ctx.prompt_len)
        selected = np.empty(0, np.int32)
        if count:
            row = rows.get(SELECTED)
            values = np.empty(0, np.float32) if row is None else row.numpy().reshape(-1)
            edges = np.concatenate(([-1.0], values, [ctx.prompt_len]))
            if len(values) != count or not (np.diff(edges) >= 1).all() or (values != np.floor(values)).any():
                raise TransferDamaged(f"{len(values)} chosen rows, {count} ascending ones of {ctx.prompt_len} are"
                                      " expected", field="draft_start",
                                      remedy="let the decode worker rebuild the draft state")
            selected = values.astype(np.int32)
        ctx.state = SparseState(spec=self._spec(ctx.tree), selected=selected, seen=np.empty(0, np.int32))

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """One tree each: a forward over all roots, then one per level."""
        active = [ctx for ctx, budget in zip(batch, budgets, strict=True) if budget > 0]
        for ctx in active:
            ctx.state.prefix, ctx.state.seen = self.view.rows(ctx.root_position, ctx.state.selected)
        with torch.inference_mode():
            if active:
                logits = self._forward([self._root(ctx) for ctx in active])
                for ctx, row in zip(active, logits.split(1), strict=True):
                    ctx.state.first = self._rank(ctx, row, 1, width(ctx.state.spec))
            limit = self.runner.config.max_context
            growths = [
                self._growth(ctx, budget, limit - ctx.root_position) for ctx, budget in zip(batch, budgets, strict=True)
            ]

            def expand(level: int, frontiers: Mapping[int, Sequence[int]]) -> torch.Tensor:
                rows = [self._nodes(batch[i], growths[i], nodes, level) for i, nodes in frontiers.items()]
                return self._forward(rows)

            return self._grown(batch, growths, expand)

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """The verification has written the rows of what it accepted; the next proposal looks at them."""
        self._learn(batch)

    def _root(self, ctx: DraftContext) -> DraftRows:
        root = ctx.root_position
        return DraftRows(ctx=ctx, token_ids=ctx.token_ids[-1:], positions=[root], slots=[root],
                         prefix=[ctx.state.prefix], paths=[self._path(ctx, [])])

    def _nodes(self, ctx: DraftContext, growth: Growth, nodes: Sequence[int], depth: int) -> DraftRows:
        behind = ctx.root_position + 1
        slots = [[behind + number for number in growth.path(node)] for node in nodes]
        return DraftRows(ctx=ctx, token_ids=[growth.token(node) for node in nodes],
                         positions=[ctx.root_position + depth] * len(nodes), slots=[path[-1] for path in slots],
                         prefix=[ctx.state.prefix] * len(nodes), paths=[self._path(ctx, path) for path in slots])

    def _path(self, ctx: DraftContext, slots: Sequence[int]) -> Ints:
        return np.concatenate((ctx.state.seen, [ctx.root_position], slots)).astype(np.int32)

    def _forward(self, rows: Sequence[DraftRows]) -> torch.Tensor:
        """Logits [all rows, V]."""
        count = sum(len(one.slots) for one in rows)
        batch = pack_rows(rows, self.cache.page_size, np.arange(count, dtype=np.int32))
        return self.runner.forward(batch, self.cache).logits
