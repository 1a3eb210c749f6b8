"""Where the randomness of a verification comes from: three verbs, so that a check can put every outcome in their place.

    coupled      noise(position, ids)                 g of the position, shared with the drafter
    rejection    bernoulli(position, turn, chance)    is this child taken?
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


def drawing_noise(seed: int, sample: int, position: int, ids: Ids) -> Floats:
    """Gumbel noise by which a drafter draws from q for the ratio rule (the k best of log q + this are k draws without
    replacement): nothing else reads this stream."""
    return gumbel(seed, sample + _DRAFT_STREAM, position, ids)
