"""How long answers take, learned from those that run, and what follows for one that comes: pure but for what it learns.

An output token takes a + b·n seconds where n answers run at once (a decode step grows with its rows); a and b are
fitted over what was seen lately. When a request may begin is simulated: those that run leave their places in order of
what is left of them, and those ahead in the queue take them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

_FORGET = 0.998  # what an observation is worth after one more token
_PRIOR = 4.0  # of a/b, while only one n was seen
_MARGIN = 1.1  # times what an answer is expected to take, where it must end in time
_LEARN = 0.1  # what the newest first token counts


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is left of an answer: output tokens that are expected, and whether the first is still to come."""

    tokens: float
    begun: bool = True
    left_s: float | None = None  # until its deadline


class Pace:
    """Seconds per output token and to the first token. ``known`` once an answer was seen."""

    def __init__(self) -> None:
        self._weight = self._n = self._nn = self._t = self._nt = 0.0
        self.first_s = 0.0
        self.share = 1.0  # of max_tokens that answers really have

    @property
    def known(self) -> bool:
        """Whether anything was seen."""
        return self._weight > 0

    def chunk(self, tokens: int, seconds: float, running: int) -> None:
        """``tokens`` of one answer came ``seconds`` after the ones before, while ``running`` answers ran."""
        keep, each = _FORGET**tokens, seconds / tokens
        self._weight = keep * self._weight + tokens
        self._n = keep * self._n + tokens * running
        self._nn = keep * self._nn + tokens * running * running
        self._t = keep * self._t + tokens * each
        self._nt = keep * self._nt + tokens * running * each

    def first(self, seconds: float) -> None:
        """The first token of an answer came ``seconds`` after it was sent to a worker."""
        self.first_s += (_LEARN if self.first_s else 1.0) * (seconds - self.first_s)

    def ended(self, tokens: int, most: int) -> None:
        """An answer has ended with ``tokens`` of ``most``."""
        self.share += _LEARN * (tokens / max(1, most) - self.share)

    def token_s(self, running: int) -> float:
        """Seconds of a token with ``running`` answers at once; 0 where nothing is known."""
        if not self.known:
            return 0.0
        n, t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - n * n
        slope = (self._nt / self._weight - n * t) / variance if variance > 0.25 else t / (n + _PRIOR)
        slope = min(max(slope, 0.0), t / max(n, 1.0))
        return max(t + slope * (running - n), 0.1 * t)

    def seconds(self, work: Work, running: int) -> float:
        """How long an answer still takes."""
        return work.tokens * self.token_s(running) + (0.0 if work.begun else self.first_s)


def wait_s(pace: Pace, running: Sequence[Work], ahead: Sequence[Work]) -> float:
    """Seconds until a request begins that must wait for a place behind ``ahead``; 0 where nobody runs."""
    if not running:
        return 0.0
    n = len(running)
    ends = [pace.seconds(work, n) for work in running]
    heapq.heapify(ends)
    for work in ahead:
        heapq.heappush(ends, heapq.heappop(ends) + pace.seconds(work, n))
    return ends[0]


def in_time(pace: Pace, work: Work, running: Sequence[Work], *, wait: float = 0.0) -> float:
    """By how many seconds ``work`` would be late, begun after ``wait`` seconds beside all but one of ``running`` where
    it has to wait, beside all of them where not; 0 or less: in time, or nobody asks."""
    if work.left_s is None or not pace.known:
        return 0.0
    beside = len(running) + (wait <= 0)
    return wait + _MARGIN * pace.seconds(work, beside) - work.left_s


def spoils(pace: Pace, running: Sequence[Work]) -> bool:
    """Whether one more beside ``running`` would make one late that is in time without it."""
    n = len(running)
    return any(
        work.left_s is not None and pace.seconds(work, n) <= work.left_s < pace.seconds(work, n + 1) for work in running
    )
