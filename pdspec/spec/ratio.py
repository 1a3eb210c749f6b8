"""The ratio rule at one node: accept or reject its children one after the other, then draw what is left.

Children drawn from q (Leviathan et al. 2023, 2211.17192; for siblings drawn without replacement the recursion of
EAGLE, 2401.15077 and of Jeon et al., 2402.14160): with p_1 = p and q_1 = q,

    take x_i with chance min(1, p_i(x_i) / q_i(x_i));   else p_{i+1} = norm(max(p_i - q_i, 0)),
                                                              q_{i+1} = norm(q_i without x_i)

Children that nobody drew (n-gram, suffix, the k best of a tree) are the one-hot case: take x_i with chance p_i(x_i),
else p_{i+1} = norm(p_i without x_i). What is left in the end is drawn from. All arithmetic is float64.

Chains may be judged as a block (Sun et al. 2024, 2403.10444, algorithm 2), which accepts at least as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pdspec.sampling import Support
from pdspec.spec.chooser import Chooser
from pdspec.spec.protocol import Law

Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Masses:
    """A distribution over ascending target ids; sums to 1."""

    ids: Ids  # [K]
    mass: Doubles  # [K]

    @classmethod
    def of(cls, support: Support) -> Masses:
        """The target's, after all processors; at temperature 0 all on its best id, ties to the lowest."""
        scores = support.scores.astype(np.float64)
        ids = np.arange(len(scores)) if support.token_ids is None else support.token_ids
        mass = np.exp(scores - scores.max())
        return cls(ids, mass / mass.sum())

    def at(self, token: int) -> float:
        """The chance of one id."""
        place = int(np.searchsorted(self.ids, token))
        return float(self.mass[place]) if place < len(self.ids) and self.ids[place] == token else 0.0

    def less(self, ids: Ids, mass: Doubles) -> Doubles:
        """max(self - other, 0) [K], not normalised; the other's ids need no order and may lie outside."""
        left = self.mass.copy()
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        inside = self.ids[places] == ids
        left[places[inside]] -= mass[inside]
        return np.maximum(left, 0.0)

    def drawn(self, position: int, chooser: Chooser) -> int:
        """A target id."""
        return int(self.ids[chooser.categorical(position, self.ids, self.mass)])


def masses_of(law: Law) -> Doubles:
    """q [D] of a law, float64, sums to 1."""
    q = np.exp(law.log_q.astype(np.float64) - float(law.log_q.max()))
    return q / q.sum()


def judge(
    p: Masses, children: Sequence[int], law: Law | None, position: int, chooser: Chooser
) -> tuple[int, Masses]:
    """(index of the child that is taken or -1, what to draw from if none is). ``children`` are token ids in order."""
    ids, q = (law.token_ids, masses_of(law)) if law is not None else (np.empty(0, np.int64), np.empty(0))
    for turn, token in enumerate(children):
        if law is not None:
            place = int(np.flatnonzero(ids == token)[0])
            chance, rest = p.at(token) / q[place], p.less(ids, q)
            q = q.copy()
            q[place] = 0.0
            if (left := q.sum()) > 0.0:
                q /= left
        else:
            chance, rest = p.at(token), p.less(np.array([token], np.int64), np.ones(1))
        total = rest.sum()
        if chance >= 1.0 or total == 0.0:  # nothing is left to draw: p and q are the same
            return turn, p
        if chance > 0.0 and chooser.bernoulli(position, turn, chance):
            return turn, p
        p = Masses(p.ids, rest / total)
    return -1, p


def judge_block(
    ps: Sequence[Masses], tokens: Sequence[int], laws: Sequence[Law], root_position: int, chooser: Chooser
) -> tuple[int, Masses]:
    """(accepted tokens of a chain, what to draw the next one from). ``ps`` [k + 1] of the root and every node, ``laws``
    [k] those that ``tokens`` [k] were drawn from."""
    weight, taken = 1.0, 0
    rests = [ps[0].less(laws[0].token_ids, masses_of(laws[0]))]
    for depth, (token, law) in enumerate(zip(tokens, laws, strict=True), 1):
        q = masses_of(law)
        weight = min(weight * ps[depth - 1].at(token) / q[int(np.flatnonzero(law.token_ids == token)[0])], 1.0)
        chance = weight
        if depth < len(tokens):
            after = laws[depth]
            rest = Masses(ps[depth].ids, weight * ps[depth].mass).less(after.token_ids, masses_of(after))
            rests.append(rest)
            total = rest.sum()
            chance = total / (total + 1.0 - weight) if total + 1.0 - weight > 0.0 else 1.0
        if chance >= 1.0 or (chance > 0.0 and chooser.bernoulli(root_position + depth, 0, chance)):
            taken = depth
    if taken == len(tokens):
        return taken, ps[taken]
    total = rests[taken].sum()
    return taken, Masses(ps[taken].ids, rests[taken] / total) if total > 0.0 else ps[taken]
