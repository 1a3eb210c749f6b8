"""Rates that a worker measures of itself and reports in Status (``metrics``), for the router to decide from
(``router/placement.py``): prompt tokens that it computes per second, bytes that a link carries per second."""

from __future__ import annotations

_MEMORY = 0.9  # what an observation still counts after the next one


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
