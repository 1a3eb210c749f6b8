"""Every outcome of a function whose randomness is a ``Chooser``, with its exact probability (float64).

The function runs again and again; each run follows the choices written down for it as far as they go, takes the first
possible outcome of every later choice, and notes what else could have come. Nothing in the function knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import TypeVar

import numpy as np

from pdspec.spec.chooser import Doubles, Floats, Ids, Indices
from pdspec.spec.protocol import Law
from pdspec.spec.ratio import masses_of

T = TypeVar("T")


@dataclass
class Enumerating:
    """A Chooser that follows ``script`` and records how many outcomes each choice had and which was ``taken``.
    ``weight`` is the probability of the run so far."""

    script: list[int]
    options: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    weight: float = 1.0

    def noise(self, position: int, ids: Ids) -> Floats:
        """Continuous, so it cannot be enumerated."""
        raise TypeError("only discrete choices can be enumerated")

    def bernoulli(self, position: int, turn: int, chance: float) -> bool:
        """True first."""
        return self._follow([(True, chance), (False, 1.0 - chance)])

    def categorical(self, position: int, ids: Ids, weights: Doubles) -> int:
        """Each index with its weight."""
        return self._follow([(index, float(weight)) for index, weight in enumerate(weights)])

    def order(self, position: int, ids: Ids, log_q: Floats, count: int) -> Indices:
        """Every order of ``count`` draws, its chance after the float64 masses of the law."""
        q = masses_of(Law(token_ids=ids, log_q=log_q))
        outcomes = []
        possible = [index for index, mass in enumerate(q) if mass > 0.0]
        for drawn in permutations(possible, min(count, len(possible))):
            chance, left = 1.0, 1.0
            for index in drawn:
                chance *= float(q[index]) / left
                left -= float(q[index])
            outcomes.append((drawn, chance))
        return np.array(self._follow(outcomes), np.int64)

    def _follow(self, outcomes: list[tuple[T, float]]) -> T:
        outcomes = [(outcome, chance) for outcome, chance in outcomes if chance > 0.0]
        place = len(self.options)
        self.taken.append(self.script[place] if place < len(self.script) else 0)
        self.options.append(len(outcomes))
        outcome, chance = outcomes[self.taken[-1]]
        self.weight *= chance
        return outcome


def outcomes_of(run: Callable[[Enumerating], T]) -> Iterator[tuple[T, float]]:
    """(result, probability) of every run; the probabilities sum to 1."""
    script: list[int] = []
    while True:
        chooser = Enumerating(script)
        yield run(chooser), chooser.weight
        taken = list(chooser.taken)
        while taken and taken[-1] + 1 == chooser.options[len(taken) - 1]:
            taken.pop()
        if not taken:
            return
        taken[-1] += 1
        script = taken


def law_of(results: Iterator[tuple[tuple[int, ...], float]]) -> dict[tuple[int, ...], float]:
    """The distribution of hashable results."""
    law: dict[tuple[int, ...], float] = {}
    for result, chance in results:
        law[result] = law.get(result, 0.0) + chance
    return law


def largest_difference(one: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    """Of two distributions, over all results of either."""
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys())
