"""The ways to prefill workers: which failed lately (tried last, and told to the router, which routes around them), and
what they carry, measured by every handoff and told to the router as well."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from pdspec.engine.rates import Line, Mean, Rate
from pdspec.types import LINK_LATENCY, LINK_OVERHEAD, LINK_RATE

REMEMBER_S = 5.0  # then a way counts as mended until it fails again; a success mends it at once
KNOWN_S = 60.0  # figures of a way that was not used for so long are not told: what uses it next measures it anew


@dataclass
class _Carried:
    """``sending`` is the sender's time by bytes, ``overhead`` seconds that no other figure explains."""

    sending: Line = field(default_factory=Line)
    overhead: Mean = field(default_factory=Mean)
    at: float = 0.0


class Links:
    """By ``Route.link``."""

    def __init__(self) -> None:
        self._failed: dict[str, float] = {}
        self._carried: dict[str, _Carried] = defaultdict(_Carried)
        self._size = Rate()

    def fail(self, link: str) -> None:
        """The peer could not be reached, or broke off, or stood still."""
        self._failed[link] = time.monotonic()

    def up(self, link: str) -> None:
        """The peer answered whole."""
        self._failed.pop(link, None)

    def is_down(self, link: str) -> bool:
        """Whether it failed within ``REMEMBER_S`` and has not worked since."""
        return time.monotonic() - self._failed.get(link, -REMEMBER_S) < REMEMBER_S

    def down(self) -> tuple[str, ...]:
        """Every link that is."""
        self._failed = {link: at for link, at in self._failed.items() if self.is_down(link)}
        return tuple(self._failed)

    def carried(
        self, link: str, *, moved: int, tokens: int, seconds: float, queue: float, prefill: float, sending: float
    ) -> None:
        """A handoff of ``moved`` bytes, those of ``tokens`` rows, came whole after ``seconds``; the prefill worker says
        how long the prompt waited, was computed, and how long sending took."""
        if not moved or not tokens or sending <= 0:
            return
        known = self._carried[link]
        known.sending.add(moved, sending)
        known.overhead.add(max(0.0, seconds - queue - max(prefill, sending)))
        known.at = time.monotonic()
        self._size.add(moved, tokens)

    def figures(self) -> dict[str, float]:
        """For Status: by link, and the bytes of one token."""
        now, found = time.monotonic(), {"handoff_bytes_per_token": self._size.value}
        for link, known in self._carried.items():
            if now - known.at < KNOWN_S:
                latency, each = known.sending.fit
                found[LINK_RATE + link], found[LINK_LATENCY + link] = 1.0 / each, latency
                found[LINK_OVERHEAD + link] = known.overhead.value
        return found
