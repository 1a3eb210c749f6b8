"""Where the randomness of an answer comes from: four verbs, so that a check can put every outcome in their place.

    coupled      noise(position, ids)                 g of the position, shared with the drafter
    rejection    order(position, ids, log_q, count)   the children that a drafter draws
                 bernoulli(position, turn, chance)    is this child taken?
                 categorical(position, ids, weights)  the token drawn where none was

``Seeded`` serves: each verb is a pure function of (seed, sample, position) and its other arguments. The ratio rule's
coins and the drafter's own draws come from streams of their own, independent of the noise and of one another: a draft
that shared the noise of ``categorical`` would bias it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pdspec.noise import gumbel, noise_key

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.integer]
Indices = npt.NDArray[np.int64]

# Sample indices are below 2^31; what lies above names another stream of the same seed.
_DRAFT_STREAM, _COIN_STREAM = 1 << 40, 2 << 40


class Chooser(Protocol):
    """``position`` is absolute; ``turn`` counts the coins of one position; ``ids`` are target ids, ascending."""

    def noise(self, position: int, ids: Ids) -> Floats:
        """g at ``ids``, float32."""

    def bernoulli(self, position: int, turn: int, chance: float) -> bool:
        """True with ``chance``, which is between 0 and 1."""

    def categorical(self, position: int, ids: Ids, weights: Doubles) -> int:
        """An index of ``ids`` with a chance of ``weights`` there; they sum to 1."""

    def order(self, position: int, ids: Ids, log_q: Floats, count: int) -> Indices:
        """``count`` distinct indices of ``ids``, drawn from q without replacement, in the order of the draws."""


@dataclass(frozen=True)
class Seeded:
    """The randomness of one answer: (seed, sample) of its request."""

    seed: int
    sample: int

    def noise(self, position: int, ids: Ids) -> Floats:
        """See Chooser."""
        return gumbel(self.seed, self.sample, position, ids)

    def bernoulli(self, position: int, turn: int, chance: float) -> bool:
        """53 bits of the position's block decide."""
        high, low = noise_key(self.seed, self.sample + _COIN_STREAM + (turn << 48), position)
        return ((high << 21) | (low >> 11)) * 2.0**-53 < chance

    def categorical(self, position: int, ids: Ids, weights: Doubles) -> int:
        """The Gumbel-max trick with the noise that plain decoding uses there."""
        with np.errstate(divide="ignore"):
            return int((np.log(weights) + self.noise(position, ids)).argmax())

    def order(self, position: int, ids: Ids, log_q: Floats, count: int) -> Indices:
        """The k best of log q + Gumbel noise are k draws without replacement; nothing else reads this stream."""
        return largest(log_q + gumbel(self.seed, self.sample + _DRAFT_STREAM, position, ids), count)


def largest(row: Floats, count: int) -> Indices:
    """Indices of the ``count`` largest of a row, best first, ties to the lowest index."""
    if count == 1:
        return np.array([row.argmax()], np.int64)
    threshold = np.partition(row, len(row) - count)[len(row) - count]
    contenders = np.flatnonzero(row >= threshold)
    return contenders[np.argsort(-row[contenders], kind="stable")][:count]
