"""Growing a draft tree level by level: EAGLE-2's expand and rerank (2406.16858), for every shape and any budget.

    level 1 = best first tokens ─▶ frontier() ─▶ one draft forward ─▶ add(children) ─▶ frontier() ─▶ … ─▶ draft()

A node's score is the log of its survival: the sum of its path's calibrated log chances (``survival.py``), or without a
calibration of its log-softmax (log q + g). Scores only fall downwards, so a node that is not among the ``budget - 1``
best so far can have no descendant among the ``budget`` best of all: it is never expanded, and the result is the same as
if it had been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pdspec.errors import PdspecError
from pdspec.sampling import draft_scores
from pdspec.spec.chooser import largest
from pdspec.spec.draws import Drawing
from pdspec.spec.protocol import Candidates, Draft, Law
from pdspec.spec.survival import FEATURES, Calibration, Forecast, Kind, features_of
from pdspec.spec.tree import DynamicTree, StaticTree, TreeSpec, select_nodes

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """The W best children of each of K nodes, best first: target ids, log q, and the score trees rank by; [K, W]."""

    token_ids: Ints
    log_q: Floats
    score: Floats
    laws: tuple[Law, ...] = ()  # [K] where the children were drawn


def rank_children(
    logits: torch.Tensor, temperature: float, noise: torch.Tensor | Drawing | None, target_ids: npt.NDArray[np.int64],
    width: int, *, drawn: bool = False,
) -> Ranked:
    """Ranks by log q + g, ties to the lowest draft id. ``logits`` [K, draft vocabulary] are of K nodes, ``noise``
    [K or 1, draft vocabulary] of the absolute positions of their children (None: 0). Each row's bits are its own. With
    a ``Drawing`` children are drawn from q, and scored by it. ``drawn``: keep each row's law.

    Raises PdspecError for scores that are NaN.
    """
    added = None if isinstance(noise, Drawing) else noise
    log_q, coupled = draft_scores(logits.float().cpu(), temperature, added)
    score = (coupled if temperature == 0.0 or added is None else torch.log_softmax(coupled, dim=-1)).numpy()
    if np.isnan(score[:, 0]).any():  # one NaN makes the whole row NaN
        raise PdspecError("draft scores are not numbers", remedy="report it; draft KV or the head is damaged")
    if not len(score):
        best = np.empty((0, width), np.int64)
    elif isinstance(noise, Drawing):
        best = np.stack([noise.order(target_ids, row, width) for row in log_q.numpy()])
    elif width == 1:
        best = score.argmax(1)[:, None]
    else:
        best = np.stack([largest(row, width) for row in score])
    row = np.arange(len(best))[:, None]
    return Ranked(
        token_ids=target_ids[best].astype(np.int32), log_q=log_q.numpy()[row, best], score=score[row, best],
        laws=tuple(Law(token_ids=target_ids, log_q=row) for row in log_q.numpy()) if drawn else (),
    )


def split_rows(ranked: Ranked, counts: Sequence[int]) -> list[Ranked]:
    """The rows of several sequences, ``counts`` of each, apart; none may have been drawn."""
    found, first = [], 0
    for count in counts:
        part = slice(first, first + count)
        found.append(Ranked(token_ids=ranked.token_ids[part], log_q=ranked.log_q[part], score=ranked.score[part]))
        first += count
    return found


def first_children(
    candidates: Candidates, drawing: Drawing | None = None, law: Law | None = None, count: int = 0
) -> Ranked:
    """First draft tokens as one row, in their order; or ``count`` of them (at most), drawn anew from ``law``, which has
    their ids, where it is given with a ``drawing``."""
    if law is None or drawing is None:
        return Ranked(token_ids=candidates.token_ids[None], log_q=candidates.log_q[None], score=candidates.score[None])
    order = drawing.order(law.token_ids, law.log_q, min(count, len(law.log_q)))
    return Ranked(
        token_ids=candidates.token_ids[order][None], log_q=law.log_q[order][None], score=law.log_q[order][None],
        laws=(law,),
    )


NO_CHILDREN = Ranked(token_ids=np.empty((1, 0), np.int32), log_q=np.empty((1, 0), np.float32),
                     score=np.empty((1, 0), np.float32))


def width(spec: TreeSpec) -> int:
    """The most children that any node of such a tree has."""
    if isinstance(spec, StaticTree):
        return max(spec.ranks) + 1
    return spec.top_k if isinstance(spec, DynamicTree) else 1


def expansions(spec: TreeSpec) -> int:
    """The most nodes that are expanded by a draft forward while such a tree grows."""
    if isinstance(spec, StaticTree):
        return len(set(spec.parents) - {-1})
    return (spec.depth - 1) * width(spec)


class Growth:
    """One tree under construction. Node indices here are in order of creation: by level, then parent, then rank. Of a
    tree whose children are drawn the first ``budget`` nodes stay: what they are may not decide over that."""

    def __init__(
        self, spec: TreeSpec, budget: int, first: Ranked, max_depth: int, threshold: float = 0.0,
        calibration: Calibration | None = None,
    ) -> None:
        """``first`` is one row: the best first tokens. No node is deeper than ``max_depth``. Nodes of a survival (e to
        the score) below ``threshold`` are neither expanded nor kept. Where they are drawn, neither that nor the
        ``calibration`` counts."""
        self._least = np.float32(np.log(threshold)) if threshold > 0.0 else -np.float32(np.inf)
        self.budget = max(0, min(budget, spec.max_nodes))
        self._static = spec if isinstance(spec, StaticTree) else None
        self._top_k = width(spec)
        self._depth = min(spec.depth, self.budget, max_depth)
        self._expanded: dict[int, int] = {}  # node → its number among the expanded
        self._tokens, self._parents = np.empty(0, np.int32), np.empty(0, np.int32)
        self._log_q, self._scores = np.empty(0, np.float32), np.empty(0, np.float32)
        self._shape: list[int] = []  # static trees: which node of the shape each node is
        self._level = 0
        self._newest = range(0)
        self._laws: dict[int, Law] = {}
        self._drawn = bool(first.laws)
        self._calibration = None if self._drawn else calibration
        self._features = np.empty((0, len(FEATURES)), np.float32)
        if self._depth > 0:
            self.add([-1], first)

    def frontier(self) -> list[int]:
        """The nodes to expand next, numbered as expanded in this order; empty when the tree is complete."""
        if self._level >= self._depth:
            return []
        alive = set(self._chosen(self.budget - 1).tolist())
        level = [node for node in self._newest if node in alive]
        if self._static is not None:
            level = [node for node in level if self._shape[node] in self._static.parents]
        else:
            level = sorted(level, key=lambda node: (-self._scores[node], node))[: self._top_k]
        for node in level:
            self._expanded[node] = len(self._expanded)
        return level

    def add(self, nodes: Sequence[int], children: Ranked) -> None:
        """Hangs children below ``nodes`` (row k of ``children`` below nodes[k]; -1 is the root)."""
        start = len(self._tokens)
        self._laws.update(zip(nodes, children.laws, strict=False))
        places = [(row, *place) for row, node in enumerate(nodes)
                  for place in self._places(node, children.score.shape[1])]  # fmt: skip
        self._shape += [place for _, _, place in places]
        rows, ranks = np.array([entry[:2] for entry in places], np.intp).reshape(-1, 2).T
        parents = np.array(nodes, np.int32)[rows]
        above = self._scores[parents] if start else np.float32(0)  # none but the first level hangs below the root
        chances = children.score[rows, ranks]
        if self._calibration is not None:
            features = features_of(children.score, children.log_q, self._level + 1)[rows, ranks]
            self._features = np.concatenate([self._features, features])
            chances = self._calibration.log_chance(features)
        scores = above + np.minimum(chances, np.float32(0))
        self._tokens = np.concatenate([self._tokens, children.token_ids[rows, ranks]])
        self._log_q = np.concatenate([self._log_q, children.log_q[rows, ranks]])
        self._parents = np.concatenate([self._parents, parents])
        self._scores = np.concatenate([self._scores, scores.astype(np.float32)])
        self._newest = range(start, len(self._tokens))
        self._level += 1

    def token(self, node: int) -> int:
        """Target id of a node."""
        return int(self._tokens[node])

    def parent(self, node: int) -> int:
        """Its parent, -1 for the root."""
        return int(self._parents[node])

    def tokens(self, node: int) -> tuple[int, ...]:
        """Target ids of its ancestors below the root and its own, topmost first."""
        found = []
        while node >= 0:
            found.append(self.token(node))
            node = self.parent(node)
        return tuple(found[::-1])

    def path(self, node: int) -> list[int]:
        """Of an expanded node: its ancestors below the root and itself, topmost first, by number among the expanded."""
        numbers = []
        while node >= 0:
            numbers.append(self._expanded[node])
            node = self.parent(node)
        return numbers[::-1]

    def draft(self) -> Draft:
        """The best ``budget`` nodes of all that were made."""
        whole = Draft(
            token_ids=self._tokens, parents=self._parents, log_q=self._log_q, survival=np.exp(self._scores),
            laws=self._laws,
        )
        kept = self._chosen(self.budget)
        return whole if len(kept) == whole.num_nodes else whole.part(kept)

    def forecast(self, kind: Kind, root: int) -> Forecast | None:
        """All nodes that were made, for the calibration of their ``kind`` to learn from; None without one."""
        if self._calibration is None:
            return None
        return Forecast(kind=kind, root=root, token_ids=self._tokens, parents=self._parents, features=self._features)

    def _chosen(self, count: int) -> Ints:
        """Indices of the ``count`` nodes that stay."""
        if self._drawn or count >= len(self._tokens):
            kept = np.arange(max(0, min(count, len(self._tokens))), dtype=np.int32)
            return kept if self._drawn else kept[self._scores[kept] >= self._least]
        kept = select_nodes(self._parents, self._scores, count).kept
        return kept[self._scores[kept] >= self._least]

    def _places(self, node: int, available: int) -> list[tuple[int, int]]:
        """(rank, node of the static shape or -1) of each child that ``node`` gets."""
        if self._static is None:
            return [(rank, -1) for rank in range(min(self._top_k, available))]
        place = self._shape[node] if node >= 0 else -1
        found = [(self._static.ranks[i], i) for i, parent in enumerate(self._static.parents) if parent == place]
        return sorted((rank, i) for rank, i in found if rank < available)
