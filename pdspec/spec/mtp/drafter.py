"""MTP as a drafter: N modules in series, each with KV of its own.

Row i of module m reads h^{m-1}_i and t_{i+m} at RoPE position i; its output h^m_i predicts t_{i+m+1}. So a token t_p
adds one row to every module m <= p, row p-m: it reads what t_{p-1} left in the module before (h^0 is the target's), and
leaves h^m_{p-m} for the row that the next token adds to the module after.

                 module 1     module 2     module 3
    t_{p-1}      row p-2      row p-3      row p-4       each row reads the target's h_{p-1}, or the output
    t_p          row p-1      row p-2      row p-3       of the row to its upper left

With root t_n module m has n+1-m final rows. Besides these a sequence keeps what t_n left: h^m_{n-m}, m = 1..N; the
first draft tokens come from h^1_{n-1}. Drafting goes on in the same way, but the target's hidden state of a draft token
is not known: a node at depth d (it stands for position n+d) has no row in modules 1..d. Once it is expanded it adds a
row to each of the others, and none of them is final:

    depth   token     module 1   module 2   module 3   module 4   its children from
    root    t_n       row n-1    row n-2    row n-3    row n-4    h^1_{n-1}
    1       t_{n+1}              row n-1    row n-2    row n-3    h^2_{n-1}
    2       t_{n+2}                         row n-1    row n-2    h^3_{n-1}
    3       t_{n+3}                                    row n-1    h^4_{n-1}

Depth d is drafted by module d, so a tree is at most N deep; modules beyond a tree's depth are left out, and so are rows
before row 0 (where n < m). In module m a node sees the n+1-m final rows, then the rows of its ancestors there; its KV
goes to a scratch slot from n on, the same in every module.

After a verification (and for every chunk of the prompt, n being the end of the chunk) the new tokens add their rows to
every module, from the target's hidden states (``stable_kv``): a+1 rows each, the first of them from what t_n had left.
DraftStart carries what t_n left in modules 1..N-1, that is h^{m-1}_{n-m+1} for m = 2..N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash

from pdspec.cache.paged import PagedCache
from pdspec.errors import InvalidRequest, TransferDamaged
from pdspec.spec.draft_rows import DraftRows, pack_rows
from pdspec.spec.feature_drafter import FeatureDrafter
from pdspec.spec.feature_rows import FeatureState
from pdspec.spec.growth import Growth
from pdspec.spec.mtp.checkpoint import Head
from pdspec.spec.mtp.config import group_name
from pdspec.spec.mtp.head import MtpModule, MtpSeries
from pdspec.spec.protocol import Candidates, DraftContext, HiddenRows, Verdict
from pdspec.spec.tree import TreeSpec


@dataclass(frozen=True, kw_only=True)
class _Nodes(DraftRows):
    """Tree nodes of one depth, whatever the module; their tree ends at depth ``deepest``."""

    depth: int
    deepest: int


def fingerprint_of(head: Head, dtype: str, modules: int, *, reuse: bool) -> str:
    """Of a drafter over ``modules`` of a head."""
    text = f"mtp/1 {head.fingerprint()} {dtype} {modules} modules {'reused' if reuse else 'in series'}"
    return xxhash.xxh3_128_hexdigest(text.encode())


class ReusedModule(FeatureDrafter):
    """Module 1 for every depth: its own output is the next row's h, as engines serve DeepSeek-V3's single module."""

    def __init__(
        self, head: Head, module: MtpModule, cache: PagedCache, *, dtype: str, tree: str, max_nodes: int = 64,
        target_matches: bool = True,
    ) -> None:
        super().__init__(
            "mtp", module, cache, group=group_name(1), target_ids=head.target_ids, want_final=True, tree=tree,
            fingerprint=fingerprint_of(head, dtype, 1, reuse=True), max_nodes=max_nodes, target_matches=target_matches,
        )


class MtpDrafter(FeatureDrafter):
    """``modules`` of ``head`` in series, each over a group of ``cache``. ``FeatureState.feature`` [1, N, H] is what the
    root left: h^m_{n-m} at index m-1, NaN where there is none or nobody reads it."""

    def __init__(
        self, head: Head, modules: Sequence[MtpModule], cache: PagedCache, *, dtype: str, tree: str = "",
        max_nodes: int = 64, target_matches: bool = True,
    ) -> None:
        self._modules, count = tuple(modules), len(modules)
        super().__init__(
            "mtp", MtpSeries(modules), cache, group=group_name(1), target_ids=head.target_ids, want_final=True,
            fingerprint=fingerprint_of(head, dtype, count, reuse=False), tree=tree or f"chain({count})",
            max_nodes=max_nodes, target_matches=target_matches,
        )
        self.groups = tuple(cache.layout(group_name(m)) for m in range(1, count + 1))
        self.carry = self.ahead = count

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """n+1-m rows of module m."""
        return {group.name: max(0, num_tokens - index) for index, group in enumerate(self.groups)}

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Writes the rows of the tokens t_1.. up to the one that follows the last hidden row, t_n where it is known. A
        chunk at 0 begins anew; a first chunk elsewhere, N rows before what is new at least, stands behind rows that are
        in the pages already. Raises ValueError for chunks out of order: rows of module 2 need what stood before."""
        state = ctx.state
        if state is None or hidden.start == 0:
            state = ctx.state = FeatureState(spec=self._spec(ctx.tree), rows=hidden.start, origin=hidden.start)
        with torch.inference_mode():
            features, made = self.model.features(hidden), -1 if state is None else state.rows
            held = 0 if state is None or state.waiting is None else len(state.waiting)
            known = min(made + held + len(features), ctx.root_position) - made
            if state is None or hidden.start != made + held or not 0 <= held + len(features) - known <= 1:
                raise ValueError(f"hidden rows {hidden.start}.. when rows of {made} tokens are made, {held} waits and"
                                 f" the root is at {ctx.root_position}")
            if state.waiting is not None:
                features = torch.cat((state.waiting, features))
            state.waiting = features[known:].clone() if len(features) > known else None
            if known > 0:
                self._extend([(ctx, known)], features[:known])

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """The W = max(16, tree width) best first tokens, and ``hidden`` [min(N-1, n), H]: h^m_{n-m}, m = 1..N-1. Raises
        ValueError before the prefill is complete."""
        candidates, rows = super().start(ctx)
        count = self._num_shipped(ctx)
        return candidates, {"hidden": rows["feature"][0, :count].contiguous()} if count else {}

    def resume(self, ctx: DraftContext, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Takes over what ``start`` gave elsewhere. Raises TransferDamaged when it is not that."""
        spec, hidden, size = self._spec(ctx.tree), rows.get("hidden"), self.model.config.hidden_size
        due = [self._num_shipped(ctx), size]
        came = [0, size] if hidden is None else list(hidden.shape)
        found = 0 if candidates is None else len(candidates.token_ids)
        if candidates is None or found != self._width(spec) or came != due:
            raise TransferDamaged(
                f"{found} first draft tokens and hidden rows of shape {came}; {self._width(spec)} and {due} are"
                " expected", field="draft_start", remedy="let the decode worker rebuild the draft state",
            )
        stack = self._nothing(1, len(self._modules))
        if hidden is not None:
            stack[0, : len(hidden)] = hidden
        ctx.state = FeatureState(spec=spec, rows=ctx.root_position, feature=stack, candidates=candidates)

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Makes the rows of the outputs in one forward per module. Raises ValueError when ``hidden`` is not of the root
        and the accepted path."""
        for ctx, verdict, hidden in batch:
            made, count = ctx.state.rows, verdict.num_accepted + 1
            if hidden.start != made or hidden.num_rows != count or made + count != ctx.root_position:
                raise ValueError(f"hidden rows {hidden.start}..+{hidden.num_rows} after {verdict.num_accepted}"
                                 f" accepted, rows of {made} tokens, root at {ctx.root_position}")
        if batch:
            self._learn(batch)
            with torch.inference_mode():
                features = self.model.features(HiddenRows.joined([hidden for _, _, hidden in batch]))
                self._extend([(ctx, hidden.num_rows) for ctx, _, hidden in batch], features)

    def _extend(self, batch: Sequence[tuple[DraftContext, int]], features: torch.Tensor) -> None:
        """Makes the rows of the next ``count`` tokens of each sequence in every module; ``features`` [R, H] are h^0 of
        the tokens before them."""
        counts = [count for _, count in batch]
        stacks = [self._nothing(1, len(self._modules)) for _ in batch]
        read = list(features.split(counts))  # what module m's new rows read, of each sequence
        for module in self._modules:
            m = module.module
            rows = [self._committed_rows(ctx, m, count) for ctx, count in batch]
            active = [i for i, one in enumerate(rows) if one.slots]
            if not active:
                break  # the modules after it have no rows either
            output = self._run(module, [rows[i] for i in active], torch.cat([read[i] for i in active]),
                               self._wanted([rows[i] for i in active], m))
            sizes = [len(rows[i].slots) if m < len(self._modules) else int(m == 1) for i in active]
            for i, made in zip(active, output.split(sizes), strict=True):
                if len(made):
                    stacks[i][0, m - 1] = made[-1]
                before = batch[i][0].state
                tail = before.feature[:, m - 1] if before.rows >= before.origin + m else made[:0]  # of the token before
                read[i] = torch.cat((tail, made))[:-1]
            for i in set(range(len(batch))) - set(active):
                read[i] = read[i][:0]
        for (ctx, count), stack in zip(batch, stacks, strict=True):
            state = ctx.state
            state.rows, state.feature, state.candidates, state.first = state.rows + count, stack, None, None

    def _wanted(self, rows: Sequence[DraftRows], m: int) -> np.ndarray:
        """Which outputs of module m are read: all by the next module, of the last module none, of an only one those
        that first draft tokens come from."""
        ends = np.cumsum([len(one.slots) for one in rows])
        if m < len(self._modules):
            return np.arange(ends[-1])
        return ends - 1 if m == 1 else np.empty(0, np.int64)

    def _committed_rows(self, ctx: DraftContext, m: int, count: int) -> DraftRows:
        """Module m's rows of the next ``count`` tokens, without those before the origin."""
        first, origin = ctx.state.rows + 1 - m, ctx.state.origin
        start, stop = max(origin, first), max(origin, first + count)
        return DraftRows.committed(ctx, ctx.token_ids[start + m : stop + m], start)

    def _nodes(self, ctx: DraftContext, growth: Growth, frontier: Sequence[int], depth: int) -> _Nodes:
        base, spec = ctx.state.rows, ctx.state.spec
        paths = [[base + number for number in growth.path(node)] for node in frontier]
        return _Nodes(
            ctx=ctx, token_ids=[growth.token(node) for node in frontier], positions=(), prefix=(), paths=paths,
            slots=[path[-1] for path in paths], depth=depth, deepest=min(spec.depth, growth.budget),
        )

    def _forward(self, rows: Sequence[DraftRows], features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """The rows of tree nodes of one depth d in modules d+1..: their parents' stacks [K, N-d+1, H] to their own
        [K, N-d, H]."""
        nodes = [one for one in rows if isinstance(one, _Nodes)]
        depth, counts = nodes[0].depth, [len(one.slots) for one in nodes]
        stack, ends = self._nothing(len(features), len(self._modules) - depth), np.cumsum(counts)
        for module in self._modules[depth:]:
            m = module.module
            active = [i for i, one in enumerate(nodes) if m <= one.deepest and one.ctx.state.rows + depth >= m]
            if not active:
                continue
            taken = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in active])
            # in the last module of a tree only its children's logits are wanted
            last = np.repeat([m == nodes[i].deepest and m > depth + 1 for i in active], [counts[i] for i in active])
            output = self._run(module, [_in_module(nodes[i], m) for i in active],
                               features[torch.from_numpy(taken), m - depth - 1], np.flatnonzero(~last))
            stack[torch.from_numpy(taken[~last]), m - depth - 1] = output
        return stack

    def _run(
        self, module: MtpModule, rows: Sequence[DraftRows], features: torch.Tensor, outputs: np.ndarray
    ) -> torch.Tensor:
        return module.forward(pack_rows(rows, self._cache.page_size), features, outputs)

    def _spec(self, tree: str) -> TreeSpec:
        spec, count = super()._spec(tree), len(self._modules)
        if spec.depth > count:
            raise InvalidRequest(
                f"{tree} is {spec.depth} deep, {count} MTP modules in series draft {count} tokens ahead", field="tree",
                remedy=f"keep the depth at {count} or below, or deploy with the option mtp:reuse=true",
            )
        return spec

    def _num_shipped(self, ctx: DraftContext) -> int:
        return min(len(self._modules) - 1, ctx.root_position)

    def _nothing(self, rows: int, modules: int) -> torch.Tensor:
        """NaN: what is not made must not be read."""
        return torch.full((rows, modules, self.model.config.hidden_size), torch.nan, device=self.model.ops.device)


def _in_module(nodes: _Nodes, m: int) -> DraftRows:
    """The rows of ``nodes`` in module m: those of ancestors before row 0 do not exist."""
    root, count = nodes.ctx.state.rows, len(nodes.slots)
    return replace(
        nodes, prefix=[max(0, root + 1 - m)] * count, positions=[root + nodes.depth - m] * count,
        paths=[path[max(0, m - root - 1) :] for path in nodes.paths],
    )
