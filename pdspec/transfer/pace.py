"""A link that is slower than the machine: what a benchmark throttles, and what an operator caps."""

from __future__ import annotations

import asyncio


class Pace:
    """Lets ``rate`` payload bytes per second pass, all streams of a worker together; 0: no limit."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Returns when ``count`` bytes more would have passed the link, those of earlier calls first."""
        if self.rate:
            now = asyncio.get_running_loop().time()
            self._free_at = max(self._free_at, now) + count / self.rate
            await asyncio.sleep(self._free_at - now)
