"""Which family drafts for a sequence in this step: suffix, a learned head, or nobody (``drafter: combined`` under
``budget: goodput``). Pure functions of offers, step times and evidence.

A family's offer is what its draft should have accepted, by node, and the seconds that it takes: a match that suffix has
found, or what the head's drafts of this sequence have promised so far at some depth, the rows that the head must catch
up with counted. With G tokens per second of the whole batch an offer is worth

    max over B of Σ of its B best nodes + curiosity − G · (its seconds + verify(rows + B) − verify(rows))

tokens more than a plain step, whose worth is 0; G is raised to what the choice itself promises until that no longer
changes it (Dinkelbach 1967, for the ratio of two sums). Newer drafts count more, and what was long not tried becomes
curious (discounted UCB: Garivier & Moulines 2011, 0805.3415), so a sequence that begins to repeat itself changes its
family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pdspec.spec.protocol import Draft
from pdspec.spec.tree import depths

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Seconds = Callable[[npt.NDArray[np.int64]], Doubles]  # of target forwards over so many rows

SUFFIX, HEAD, NOBODY = "suffix", "head", "none"
_MEMORY = 0.95  # what evidence still counts after the next draft of its family
_FADE = 0.99  # what a draft still counts after the next verification of its sequence, where curiosity counts drafts
_PRIOR = 2.0  # promised tokens that ``prior`` stands for
_LEAST_DRAFTS = 0.25
_CURIOSITY = 0.1  # tokens
_LONGEST = 16.0  # verifications over which catching up is paid off, at most
_ROUNDS = 4


@dataclass
class Evidence:
    """One family on one sequence: tokens that its drafts promised, level by level, and that the target then said;
    ``tried`` are its drafts, those of long ago counting less, ``told`` the tokens that were right per draft; ``prior``
    is the credibility before there is any."""

    prior: float = 1.0
    promised: float = 0.0
    accepted: float = 0.0
    tried: float = 0.0
    told: float | None = None

    def fade(self) -> None:
        """A verification has passed."""
        self.tried *= _FADE

    def add(self, promised: float, accepted: int) -> None:
        """One draft was judged; an empty one promised nothing."""
        self.tried += 1
        if promised <= 0:
            return
        self.promised = _MEMORY * self.promised + promised
        self.accepted = _MEMORY * self.accepted + accepted
        self.told = float(accepted) if self.told is None else _MEMORY * self.told + (1 - _MEMORY) * accepted

    @property
    def credibility(self) -> float:
        """Right tokens per promised one, at any level."""
        return (self.accepted + _PRIOR * self.prior) / (self.promised + _PRIOR)

    def curiosity(self, verifications: int) -> float:
        """Tokens by which it may be better than it seems after so many verifications of the sequence."""
        return _CURIOSITY * math.sqrt(math.log1p(verifications) / (self.tried + _LEAST_DRAFTS))


@dataclass(frozen=True, kw_only=True, eq=False)
class Offer:
    """What one family would draft for one sequence: chances [N] of its nodes, and the seconds that takes."""

    family: str
    survival: Floats
    seconds: float
    curiosity: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Tokens that an offer is worth beyond a plain step, those that it promises, and the nodes that are verified."""

    tokens: float
    promised: float
    nodes: int


def worth(offer: Offer, goodput: float, more_rows: Seconds) -> Worth:
    """``more_rows`` are the seconds that so many rows add to the forward. An offer without nodes is worth nothing."""
    best = -np.sort(-offer.survival[offer.survival > 0])
    if not len(best):
        return Worth(tokens=0.0, promised=0.0, nodes=0)
    promised = np.cumsum(best, dtype=np.float64)
    rows = np.arange(1, len(best) + 1)
    tokens = promised + offer.curiosity - goodput * (offer.seconds + more_rows(rows))
    at = int(tokens.argmax())
    return Worth(tokens=float(tokens[at]), promised=float(promised[at]), nodes=at + 1)


def choose(offers: Sequence[Sequence[Offer]], tokens: int, rows: int, verify_s: Seconds) -> list[str]:
    """For each sequence the family whose offer is worth most, ``none`` where no offer is worth its time. ``tokens`` are
    put out and ``rows`` are in the forward whatever is chosen. The earlier of equals."""
    base = float(verify_s(np.array([rows]))[0])
    goodput, chosen = tokens / base, list[str]()
    for _ in range(_ROUNDS):
        found = [[(worth(one, goodput, lambda more: verify_s(rows + more) - base), one) for one in own]
                 for own in offers]  # fmt: skip
        best = [max(own, key=lambda pair: pair[0].tokens, default=None) for own in found]
        taken = [pair if pair is not None and pair[0].tokens > 0 else None for pair in best]
        chosen = [NOBODY if pair is None else pair[1].family for pair in taken]
        kept = [pair for pair in taken if pair is not None]
        seconds = float(verify_s(np.array([rows + sum(value.nodes for value, _ in kept)]))[0])
        promised = tokens + sum(value.promised for value, _ in kept)
        raised = promised / (seconds + sum(offer.seconds for _, offer in kept))
        if raised <= goodput * (1 + 1e-6):
            break
        goodput = raised
    return chosen


def paid_off(catch_up: float, remaining: int) -> float:
    """What of the seconds to catch up one draft pays: a sequence that changes to the head stays there for a while."""
    return catch_up / min(_LONGEST, max(1.0, remaining / 4))


def accepted_each(mean: float) -> Floats:
    """``mean`` accepted tokens per draft as chances of as many nodes."""
    return np.clip(mean - np.arange(math.ceil(mean)), 0.0, 1.0).astype(np.float32)


def credible(survival: Floats, depth: npt.NDArray[np.int32], evidence: Evidence) -> Floats:
    """Chances of nodes at ``depth`` (1 below the root) by what became of earlier promises; both of one shape."""
    return np.minimum(survival * np.float32(evidence.credibility) ** depth, np.float32(1.0)).astype(np.float32)


def believed(draft: Draft, evidence: Evidence) -> Draft:
    """The draft with credible chances, which still only fall down a path."""
    survival = credible(draft.survival, depths(draft.parents), evidence)
    for node, parent in enumerate(draft.parents.tolist()):
        if parent >= 0:
            survival[node] = min(survival[node], survival[parent])
    return replace(draft, survival=survival)


def judged(draft: Draft, output_ids: Sequence[int]) -> tuple[float, int]:
    """(promised, right) tokens of a draft, verified or not, at each level that the target reached: the chance that one
    of the reached node's children is right, and how many levels had it."""
    promised, right, node = 0.0, 0, -1
    for token in output_ids:
        children = np.flatnonzero(draft.parents == node)
        if not len(children):
            break
        above = 1.0 if node < 0 else max(float(draft.survival[node]), 1e-6)
        promised += min(1.0, float(draft.survival[children].sum()) / above)
        said = children[draft.token_ids[children] == token]
        if not len(said):
            break
        right, node = right + 1, int(said[0])
    return promised, right
