"""What is retracted, and how: pure functions of what is known of the running answers. No torch, no clock.

    keep     copy the rows of all cache groups to host memory and back: seconds by bytes
    replay   drop them, and compute the rows of prompt and answer anew: seconds by rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol, TypeVar

Rank = tuple[int, int]
_LEAST_BYTES = 1 << 20  # of a copy, below which its time says little about a byte
_STEP = 1.3  # a measurement moves an entry by as much at most: it may have been interrupted


class Ranked(Protocol):
    """What the order of answers depends on."""

    number: int

    @property
    def priority(self) -> int:
        """Higher goes first."""


class Running(Ranked, Protocol):
    """What decides who gives way."""

    @property
    def paused(self) -> bool:
        """Its reader is behind."""

    def retraction_s(self) -> float:
        """Seconds that its way out and back take."""


A = TypeVar("A", bound=Running)


class Way(StrEnum):
    """Of a retraction."""

    KEEP = "keep"
    REPLAY = "replay"


def rank(item: Ranked) -> Rank:
    """Smaller goes first: the higher priority, then the earlier arrival."""
    return -item.priority, item.number


def cheapest(candidates: Sequence[A]) -> A | None:
    """Who gives way: those that nobody reads, then the lowest priority, then the least seconds, then the latest."""
    return min(
        candidates, key=lambda one: (not one.paused, one.priority, one.retraction_s(), -one.number), default=None
    )


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The table: seconds of a byte copied (out and back, each way counted once) and of a row computed; measured as the
    worker runs, from guesses that favour keeping."""

    copy_s: float = 1e-9
    row_s: float = 1e-3

    def keep(self, nbytes: int) -> float:
        """Seconds out and back."""
        return 2 * nbytes * self.copy_s

    def replay(self, rows: int) -> float:
        """Seconds to compute them again."""
        return rows * self.row_s

    def way(self, *, nbytes: int, rows: int, room: int, exact: bool) -> Way:
        """How to retract ``rows`` rows of ``nbytes`` bytes with ``room`` bytes of host memory left. What a replay would
        not repeat bit by bit (``exact`` False) is kept whatever it costs."""
        if not exact:
            return Way.KEEP
        return Way.KEEP if nbytes <= room and self.keep(nbytes) <= self.replay(rows) else Way.REPLAY

    def copied(self, nbytes: int, seconds: float) -> Costs:
        """With one more copy measured."""
        found = seconds / max(nbytes, _LEAST_BYTES)
        return replace(self, copy_s=min(max(found, self.copy_s / _STEP), self.copy_s * _STEP))

    def computed(self, rows: int, seconds: float) -> Costs:
        """With one more forward measured. The best share of a row counts: the chunks of a replay are wide."""
        return self if rows <= 0 else replace(self, row_s=min(seconds / rows, 1.01 * self.row_s))
