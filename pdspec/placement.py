"""How a cluster's devices are shared out among workers: arithmetic, without Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence


def share(amounts: Sequence[float], ranks: Sequence[int]) -> float:
    """The largest of 1, 1/2, 1/3 … that every rank can get from nodes with ``amounts`` of a resource, when those of a
    worker (``ranks``: how many each has) lie on one node; 0 when there is none. Ray cannot give one rank fractions of
    two devices."""
    if not ranks or sum(amounts) <= 0:
        return 0.0
    parts = 1
    while not _fit([math.floor(amount * parts + 1e-9) for amount in amounts], ranks):
        parts += 1
    return math.floor(1e4 / parts) / 1e4


def _fit(places: list[int], ranks: Sequence[int]) -> bool:
    """Whether nodes with so many places have room for all workers. Uses up ``places``."""
    for count in sorted(ranks, reverse=True):  # the widest workers first, each where most is left
        node = places.index(max(places))
        places[node] -= count
        if places[node] < 0:
            return False
    return True
