"""Rates that a worker measures of itself and reports in Status (``metrics``), for the router to decide from
(``router/placement.py``): prompt tokens that it computes per second, bytes that a link carries per second."""

from __future__ import annotations

import math

_MEMORY, _LONG_MEMORY = 0.9, 0.98  # what an observation still counts after the next one


class Rate:
    """``count`` per second over the newest observations, each as heavy as it was long. One thread writes; any reads."""

    def __init__(self) -> None:
        self._sums = (0.0, 0.0)

    def add(self, count: float, seconds: float) -> None:
        """One observation."""
        counted, elapsed = self._sums
        self._sums = _MEMORY * counted + count, _MEMORY * elapsed + seconds

    @property
    def value(self) -> float:
        """0 where nothing was observed."""
        counted, elapsed = self._sums
        return counted / elapsed if elapsed > 0 else 0.0


class Mean:
    """The mean of the newest observations."""

    def __init__(self) -> None:
        self._rate = Rate()

    def add(self, value: float) -> None:
        """One observation."""
        self._rate.add(value, 1.0)

    @property
    def value(self) -> float:
        """0 where nothing was observed."""
        return self._rate.value


class Line:
    """Seconds as a constant and a part for each of ``count``, by least squares over the newest observations. Neither is
    negative; where the counts do not differ all of it is taken for the second part. An observation counts as
    ``furthest`` times what was expected at most: one step that was held up would tilt the line."""

    def __init__(self, furthest: float = math.inf) -> None:
        self._furthest = furthest
        self._sums: tuple[float, ...] = (0.0,) * 5

    def add(self, count: float, seconds: float) -> None:
        """One observation."""
        constant, each = self.fit
        if each > 0:
            seconds = min(seconds, self._furthest * (constant + each * count))
        new = 1.0, count, seconds, count * count, count * seconds
        self._sums = tuple(_LONG_MEMORY * old + one for old, one in zip(self._sums, new, strict=True))

    @property
    def fit(self) -> tuple[float, float]:
        """(constant seconds, seconds of each); zeros where nothing was observed."""
        n, x, y, xx, xy = self._sums
        if x <= 0:
            return 0.0, 0.0
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else 0.0
        constant = (y - slope * x) / n
        if slope <= 0:
            return 0.0, y / x
        return (constant, slope) if constant > 0 else (0.0, xy / xx)
