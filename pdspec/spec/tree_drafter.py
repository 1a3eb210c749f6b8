"""What drafters with a q have in common: which trees they draft, how children are ranked, and the growth of many trees
at once.

    first children ─▶ frontier of every tree ─▶ one draft forward ─▶ children of every tree ─▶ … ─▶ drafts
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from pdspec.errors import InvalidRequest
from pdspec.spec.draws import Drawing, candidate_noise, cut_law, draws_from_q, position_noise
from pdspec.spec.growth import NO_CHILDREN, Growth, Ranked, expansions, first_children, rank_children, split_rows, width
from pdspec.spec.protocol import Candidates, Draft, DraftContext
from pdspec.spec.survival import Calibrated, Forecast, Kind
from pdspec.spec.tree import TreeSpec, parse_tree

FIRST_CHOICES = 16  # first draft tokens kept (and shipped) at least, whatever the tree

# expand(level, frontiers): runs the nodes ``frontiers[i]`` of tree i, all at depth ``level``, through the draft model;
# their logits [nodes of all trees, draft vocabulary], in that order.
Expand = Callable[[int, Mapping[int, Sequence[int]]], torch.Tensor]


class TreeState(Protocol):
    """The part of a sequence's state that trees need. ``candidates`` are what crosses the handoff, ``first`` the first
    children of the next tree; both are made when first needed."""

    spec: TreeSpec
    candidates: Candidates | None
    first: Ranked | None
    forecast: Forecast | None  # of the tree under verification


class TreeDrafter(Calibrated):
    """``target_ids`` int64 [draft vocabulary] are the target ids of its draft ids; ``tree`` is drafted where a request
    names none. A request's tree may have ``max_nodes`` nodes and expand as many."""

    threshold = 0.0  # see Growth

    def __init__(self, name: str, *, target_ids: torch.Tensor, tree: str, max_nodes: int) -> None:
        super().__init__()
        self.name, self.max_nodes, self.default_tree = name, max_nodes, tree
        self._target_ids = target_ids
        self._ids = target_ids.numpy()
        self._spec(self.default_tree)

    def depth(self, tree: str) -> int:
        """Deepest node under a request's tree. Raises UnknownName or InvalidRequest for a tree it cannot draft."""
        return self._spec(tree).depth

    def _spec(self, tree: str) -> TreeSpec:
        spec = parse_tree(tree or self.default_tree)
        if max(spec.max_nodes, expansions(spec)) > self.max_nodes:
            raise InvalidRequest(f"drafter {self.name} cannot draft {tree}: {spec.max_nodes} nodes, {expansions(spec)}"
                                 " expanded", field="tree", remedy=f"keep both at {self.max_nodes} or below")
        return spec

    def _width(self, spec: TreeSpec) -> int:
        return min(max(FIRST_CHOICES, width(spec)), len(self._ids))

    def _candidates(self, ctx: DraftContext, spec: TreeSpec, logits: torch.Tensor) -> Candidates:
        """The W = max(16, tree width) best first tokens, to be shipped; ``logits`` [1, draft vocabulary]."""
        best = rank_children(logits, ctx.sampling.temperature, candidate_noise(ctx, 1, self._target_ids), self._ids,
                             self._width(spec))
        return Candidates(token_ids=best.token_ids[0], log_q=best.log_q[0], score=best.score[0])

    def _shipped(self, ctx: DraftContext, spec: TreeSpec, candidates: Candidates) -> Ranked:
        """First children from what was shipped."""
        noise = position_noise(ctx, spec, 1, self._target_ids)
        if not isinstance(noise, Drawing):
            return first_children(candidates)
        return first_children(candidates, noise, cut_law(candidates), width(spec))

    def _rank_each(
        self, batch: Sequence[DraftContext], counts: Sequence[int], logits: torch.Tensor, depth: int
    ) -> list[Ranked]:
        """The children at ``depth`` of each sequence's nodes, ``counts`` of them: those of sequences that rank alike in
        one go. ``logits`` [nodes of all, draft vocabulary], in that order."""
        alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index, ctx in enumerate(batch):
            spec, sampling = ctx.state.spec, ctx.sampling
            drawn = draws_from_q(ctx, spec)
            alike[width(spec), sampling.temperature, sampling.verify, index if drawn else -1].append(index)
        rows, found = logits.split(list(counts)), dict[int, Ranked]()
        for group in alike.values():
            first, wide = batch[group[0]], width(batch[group[0]].state.spec)
            if len(group) == 1:
                found[group[0]] = self._rank(first, rows[group[0]], depth, wide)
                continue
            whole = logits if len(group) == len(batch) else torch.cat([rows[index] for index in group])
            ranked = rank_children(whole, first.sampling.temperature, self._noise(batch, counts, group, depth),
                                   self._ids, min(wide, len(self._ids)))
            found |= zip(group, split_rows(ranked, [counts[index] for index in group]), strict=True)
        return [found[index] for index in range(len(batch))]

    def _noise(
        self, batch: Sequence[DraftContext], counts: Sequence[int], group: Sequence[int], depth: int
    ) -> torch.Tensor | None:
        """[nodes of the group, draft vocabulary]; None: nothing is added."""
        own = [candidate_noise(batch[index], depth, self._target_ids) for index in group]
        each = [one.expand(counts[index], -1) for index, one in zip(group, own, strict=True) if one is not None]
        return torch.cat(each) if each else None

    def _rank(self, ctx: DraftContext, logits: torch.Tensor, depth: int, count: int) -> Ranked:
        """The best ``count`` children at ``depth`` of each node, by the noise of their position; where they are drawn,
        as many as the tree has."""
        spec: TreeSpec = ctx.state.spec
        noise = position_noise(ctx, spec, depth, self._target_ids)
        count = min(count, width(spec)) if isinstance(noise, Drawing) else count
        return rank_children(logits, ctx.sampling.temperature, noise, self._ids, min(count, len(self._ids)),
                             drawn=draws_from_q(ctx, spec))

    def _growth(self, ctx: DraftContext, budget: int, deepest: int) -> Growth:
        """A tree with its first level, no deeper than ``deepest``."""
        first = ctx.state.first if budget > 0 else None
        return Growth(ctx.state.spec, budget, NO_CHILDREN if first is None else first, min(deepest, ctx.deepest),
                      self.threshold, self.survival.calibration(Kind.of(ctx.sampling)))

    def _draft(self, ctx: DraftContext, growth: Growth) -> Draft:
        """A grown tree; all that it was chosen from waits for the target's verdict."""
        ctx.state.forecast = growth.forecast(Kind.of(ctx.sampling), ctx.root_position)
        return growth.draft()

    def _grown(self, batch: Sequence[DraftContext], growths: Sequence[Growth], expand: Expand) -> list[Draft]:
        """Whole trees: one forward per level over all of them, none for what cannot enter a tree any more."""
        for level in range(1, max((growth.budget for growth in growths), default=0)):
            frontiers = {i: nodes for i, growth in enumerate(growths) if (nodes := growth.frontier())}
            if not frontiers:
                break
            logits = expand(level, frontiers)
            counts = [len(nodes) for nodes in frontiers.values()]
            ranked = self._rank_each([batch[i] for i in frontiers], counts, logits, level + 1)
            for (i, nodes), children in zip(frontiers.items(), ranked, strict=True):
                growths[i].add(nodes, children)
        return [self._draft(ctx, growth) for ctx, growth in zip(batch, growths, strict=True)]
