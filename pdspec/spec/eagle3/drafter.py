"""EAGLE-3 as a drafter.

Draft KV row i reads the target's features h_i and the token t_{i+1}, at RoPE position i; its output predicts t_{i+2}.
With root t_n the rows 0..n-1 are committed; their slots are their indices. While a tree grows, an expanded node at
depth d (it stands for absolute position n+d) is row n+d-1: RoPE position n+d-1, feature = its parent's output, KV in a
scratch slot after the committed rows. After a verification the rows of the accepted tokens are made anew from the
target's features (``stable_kv``), over the scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from pdspec.cache.paged import PagedCache
from pdspec.errors import InvalidRequest, TransferDamaged
from pdspec.model.batch import ForwardBatch
from pdspec.noise import gumbel_noise
from pdspec.spec.eagle3.checkpoint import Head
from pdspec.spec.eagle3.config import GROUP
from pdspec.spec.eagle3.head import Eagle3Head
from pdspec.spec.growth import Growth, Ranked, expansions, rank_children, width
from pdspec.spec.protocol import Candidates, Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.tree import TreeSpec, parse_tree
from pdspec.types import CacheGroup

FIRST_CHOICES = 16  # first draft tokens kept (and shipped) at least, whatever the tree


@dataclass(kw_only=True)
class Eagle3State:
    """A sequence's part. ``feature`` [1, H] is the output of the last committed row, ``waiting`` [1 or 0, H] the fused
    features of the row whose token is not known yet. ``candidates`` are made when first needed."""

    spec: TreeSpec
    rows: int  # committed draft rows
    waiting: torch.Tensor | None = None
    feature: torch.Tensor | None = None
    candidates: Candidates | None = None


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Rows of one sequence in a draft forward."""

    ctx: DraftContext
    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    paths: Sequence[Sequence[int]]  # slots of ancestors and itself; empty: a committed row


class Eagle3Drafter:
    """``head`` over the pages of ``cache``; ``tree`` is drafted where a request names none.

    ``target_matches`` is False when the head was made for other weights of this geometry. A request's tree may have
    ``max_nodes`` nodes and expand as many. ``embedding`` is the target's, packed by the head's ``ops``.
    """

    name = "eagle3"
    want_final = False

    def __init__(
        self, head: Head, model: Eagle3Head, cache: PagedCache, *, dtype: str, tree: str = "chain(2)",
        max_nodes: int = 64, target_matches: bool = True,
    ) -> None:
        self.model, self.max_nodes, self.target_matches = model, max_nodes, target_matches
        self.groups: tuple[CacheGroup, ...] = (cache.layout(GROUP),)
        self.capture = head.config.fused_layers
        self.default_tree = tree
        self._page_size = cache.page_size
        self._target_ids = head.target_ids
        self._ids = head.target_ids.numpy()
        self._fingerprint = xxhash.xxh3_128_hexdigest(f"eagle3/1 {head.fingerprint()} {dtype} no padding".encode())
        self._spec(self.default_tree)

    def fingerprint(self) -> str:
        """Hash of weights, geometry, vocabulary map and compute dtype."""
        return self._fingerprint

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        """As many rows as tokens before the root."""
        return {GROUP: num_tokens}

    def depth(self, tree: str) -> int:
        """Deepest node under a request's tree. Raises UnknownName or InvalidRequest for a tree it cannot draft."""
        return self._spec(tree).depth

    def prefill(self, ctx: DraftContext, hidden: HiddenRows) -> None:
        """Writes the rows whose features and next token are known; the last row waits for t_n. A chunk at 0 begins
        anew; a first chunk elsewhere stands behind rows that are in the pages already. Raises ValueError for chunks
        out of order."""
        state = ctx.state
        if state is None or hidden.start == 0:
            state = ctx.state = Eagle3State(spec=self._spec(ctx.tree), rows=hidden.start)
        with torch.inference_mode():
            features = self.model.fuse(_captured(hidden))
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
            state.feature, state.candidates = (output if last else None), None

    def start(self, ctx: DraftContext) -> tuple[Candidates | None, dict[str, torch.Tensor]]:
        """The W = max(16, tree width) best first tokens and the last row's output, ``feature`` [1, H]. Raises
        ValueError before the prefill is complete."""
        state = self._state(ctx)
        with torch.inference_mode():
            self._find_candidates([ctx])
        assert state.feature is not None
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
        ctx.state = Eagle3State(spec=spec, rows=ctx.root_position, feature=feature, candidates=candidates)

    def propose(self, batch: Sequence[DraftContext], budgets: Sequence[int]) -> list[Draft]:
        """One tree each: one forward per level over all sequences, none for what cannot enter a tree any more."""
        states = [self._state(ctx) for ctx in batch]
        with torch.inference_mode():
            self._find_candidates([ctx for ctx, budget in zip(batch, budgets, strict=True) if budget > 0])
            growths = [self._growth(ctx, budget) for ctx, budget in zip(batch, budgets, strict=True)]
            outputs = [{-1: state.feature} for state in states]  # of the nodes expanded last, [1, H]
            for level in range(1, max((g.budget for g in growths), default=0)):
                frontiers = [growth.frontier() for growth in growths]
                active = [i for i, frontier in enumerate(frontiers) if frontier]
                if not active:
                    break
                rows = [self._nodes(batch[i], growths[i], frontiers[i], level) for i in active]
                parents = [outputs[i][growths[i].parent(node)] for i in active for node in frontiers[i]]
                features = torch.cat([feature for feature in parents if feature is not None])
                output = self._forward(rows, features, np.arange(len(features)))
                logits, first = self.model.logits(output), 0
                for i in active:
                    stop = first + len(frontiers[i])
                    ranked = self._rank(batch[i], logits[first:stop], level + 1, width(states[i].spec))
                    growths[i].add(frontiers[i], ranked)
                    outputs[i] = dict(zip(frontiers[i], output[first:stop].split(1), strict=True))
                    first = stop
        return [growth.draft() for growth in growths]

    def observe(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Rebuilds the rows of the root and the accepted path in one forward. Raises ValueError when ``hidden`` is not
        of these rows."""
        rows, captured = [], []
        for ctx, verdict, hidden in batch:
            state, count = ctx.state, verdict.num_accepted + 1
            taken = _captured(hidden)
            if hidden.start != state.rows or len(taken) != count or state.rows + count != ctx.root_position:
                raise ValueError(f"hidden rows {hidden.start}..+{len(taken)} after {verdict.num_accepted} accepted,"
                                 f" {state.rows} draft rows, root at {ctx.root_position}")
            rows.append(self._committed(ctx, state.rows, count))
            captured.append(taken)
        if not batch:
            return
        with torch.inference_mode():
            ends = np.cumsum([len(one) for one in captured]) - 1
            output = self._forward(rows, self.model.fuse(torch.cat(captured)), ends)
            for (ctx, _, _), feature in zip(batch, output.split(1), strict=True):
                ctx.state.rows, ctx.state.feature, ctx.state.candidates = ctx.root_position, feature, None

    def _spec(self, tree: str) -> TreeSpec:
        spec = parse_tree(tree or self.default_tree)
        if max(spec.max_nodes, expansions(spec)) > self.max_nodes:
            raise InvalidRequest(f"drafter {self.name} cannot draft {tree}: {spec.max_nodes} nodes, {expansions(spec)}"
                                 " expanded", field="tree", remedy=f"keep both at {self.max_nodes} or below")
        return spec

    def _width(self, spec: TreeSpec) -> int:
        return min(max(FIRST_CHOICES, width(spec)), len(self._ids))

    def _state(self, ctx: DraftContext) -> Eagle3State:
        state = ctx.state
        if state is None or state.feature is None or state.rows != ctx.root_position:
            rows = None if state is None else state.rows
            raise ValueError(f"{ctx.request_id}: {rows} draft rows with the root at {ctx.root_position}")
        return state

    def _find_candidates(self, batch: Sequence[DraftContext]) -> None:
        """First tokens of the sequences that have none yet: one product over all of them, then each for itself."""
        missing = [ctx for ctx in batch if ctx.state.candidates is None]
        if not missing:
            return
        logits = self.model.logits(torch.cat([ctx.state.feature for ctx in missing]))
        for ctx, row in zip(missing, logits.split(1), strict=True):
            best = self._rank(ctx, row, 1, self._width(ctx.state.spec))
            ctx.state.candidates = Candidates(token_ids=best.token_ids[0], log_q=best.log_q[0], score=best.score[0])

    def _rank(self, ctx: DraftContext, logits: torch.Tensor, depth: int, count: int) -> Ranked:
        """The best ``count`` children at ``depth`` of each node, by the noise of their position."""
        temperature, noise = ctx.sampling.temperature, None
        if temperature > 0.0:
            seed, sample = ctx.noise_key
            noise = gumbel_noise(seed, sample, ctx.root_position + depth, token_ids=self._target_ids)
        return rank_children(logits, temperature, noise, self._ids, min(count, len(self._ids)))

    def _growth(self, ctx: DraftContext, budget: int) -> Growth:
        first = ctx.state.candidates if budget > 0 else None
        if first is None:
            first = Candidates(token_ids=np.empty(0, np.int32), log_q=np.empty(0, np.float32),
                               score=np.empty(0, np.float32))
        ranked = Ranked(token_ids=first.token_ids[None], log_q=first.log_q[None], score=first.score[None])
        deepest = max(1, self.model.max_positions - ctx.root_position + 1)
        return Growth(ctx.state.spec, budget, ranked, deepest)

    def _committed(self, ctx: DraftContext, first: int, count: int) -> _Rows:
        rows = range(first, first + count)
        return _Rows(ctx=ctx, token_ids=ctx.token_ids[first + 1 : first + count + 1], positions=rows, slots=rows,
                     paths=[()] * count)

    def _nodes(self, ctx: DraftContext, growth: Growth, frontier: Sequence[int], depth: int) -> _Rows:
        base = ctx.state.rows
        paths = [[base + number for number in growth.path(node)] for node in frontier]
        return _Rows(ctx=ctx, token_ids=[growth.token(node) for node in frontier],
                     positions=[ctx.root_position + depth - 1] * len(frontier), slots=[path[-1] for path in paths],
                     paths=paths)

    def _forward(self, rows: Sequence[_Rows], features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """One forward over the rows of several sequences; see ``Eagle3Head.forward``."""
        longest = max(len(path) for one in rows for path in one.paths)
        table = np.full((len(rows), max(len(one.ctx.pages) for one in rows)), -1, np.int32)
        ancestors = np.full((len(features), longest), -1, np.int32)
        prefix = np.empty(len(features), np.int32)
        row = 0
        for index, one in enumerate(rows):
            table[index, : len(one.ctx.pages)] = one.ctx.pages
            if max(one.slots) >= len(one.ctx.pages) * self._page_size:
                raise ValueError(f"{one.ctx.request_id}: draft row {max(one.slots)} in {len(one.ctx.pages)} pages")
            for slot, path in zip(one.slots, one.paths, strict=True):
                ancestors[row, : len(path)] = path
                prefix[row] = one.ctx.state.rows if path else slot + 1
                row += 1

        def flat(name: str) -> np.ndarray:
            return np.array([value for one in rows for value in getattr(one, name)], np.int32)

        batch = ForwardBatch(
            token_ids=flat("token_ids"), positions=flat("positions"), slots=flat("slots"), prefix_len=prefix,
            sequence=np.repeat(np.arange(len(rows), dtype=np.int32), [len(one.slots) for one in rows]),
            ancestors=ancestors, page_table=table, logit_rows=np.empty(0, np.int32),
        )
        return self.model.forward(batch, features, outputs)


def _captured(hidden: HiddenRows) -> torch.Tensor:
    if hidden.captured is None:
        raise ValueError("the target's fused layers were not captured")
    return hidden.captured
