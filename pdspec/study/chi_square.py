"""Pearson's chi-square test of counts against a known law, and its power against a stated alternative."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

ALPHA = 1e-4  # of every test; seeds are fixed, so that a test that passes always passes
LEAST_EXPECTED = 8.0  # counts; rarer results are put together in one bin
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """``statistic`` over ``bins``, and the chance of one as large under the law."""

    samples: int
    bins: int
    statistic: float
    p_value: float

    @property
    def ok(self) -> bool:
        """Whether the law is not rejected at ALPHA."""
        return self.p_value >= ALPHA


def fit(counts: Mapping[K, int], law: Mapping[K, float]) -> Fit:
    """Of ``counts``; what the law excludes must not have come at all."""
    samples = sum(counts.values())
    bins = _bins(law, samples)
    seen = {bin_: 0 for bin_ in bins.values()}
    for result, count in counts.items():
        if count and law.get(result, 0.0) <= 0.0:
            return Fit(samples=samples, bins=len(seen), statistic=math.inf, p_value=0.0)
        seen[bins[result]] += count
    expected = _summed(law, bins, samples)
    statistic = sum((seen[one] - expected[one]) ** 2 / expected[one] for one in seen)
    return Fit(samples=samples, bins=len(seen), statistic=statistic, p_value=_above(statistic, len(seen) - 1))


def power(law: Mapping[K, float], alternative: Mapping[K, float], samples: int) -> float:
    """The chance that ``fit`` rejects ``law`` at ALPHA when ``samples`` come from ``alternative``: the noncentral
    chi-square distribution as a mixture of central ones."""
    bins = _bins(law, samples)
    one, other = _summed(law, bins, samples), _summed(alternative, bins, samples)
    distance = sum((other[bin_] - one[bin_]) ** 2 / one[bin_] for bin_ in one)
    freedom = len(one) - 1
    low, high = 0.0, 1e6
    for _ in range(80):  # the value that the statistic must exceed
        middle = (low + high) / 2
        low, high = (middle, high) if _above(middle, freedom) > ALPHA else (low, middle)
    chance, terms = 0.0, int(distance / 2 + 12 * math.sqrt(distance / 2 + 1) + 20)
    for term in range(terms):
        weight = math.exp(-distance / 2 + term * math.log(max(distance, 1e-300) / 2) - math.lgamma(term + 1))
        chance += weight * _above(high, freedom + 2 * term)
    return chance


def _above(statistic: float, freedom: int) -> float:
    """The chance of a larger chi-square statistic."""
    if freedom < 1:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _bins(law: Mapping[K, float], samples: int) -> dict[K, K | None]:
    """Each result is its own bin, or the tail's (None); a tail that is too rare takes the rarest bin in."""
    ordered = sorted((result for result in law if law[result] > 0.0), key=lambda result: law[result])
    bins: dict[K, K | None] = {}
    tail = 0.0
    for result in ordered:
        rare = law[result] * samples < LEAST_EXPECTED or 0.0 < tail * samples < LEAST_EXPECTED
        tail += law[result] if rare else 0.0
        bins[result] = None if rare else result
    return bins


def _summed(law: Mapping[K, float], bins: Mapping[K, K | None], samples: int) -> dict[K | None, float]:
    expected = {bin_: 0.0 for bin_ in bins.values()}
    for result, bin_ in bins.items():
        expected[bin_] += law.get(result, 0.0) * samples
    return expected
