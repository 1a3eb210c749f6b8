"""What the decode workers of a deployment spent on a cell, by the clocks that their router tells of.

A decode step is drafting (what a drafter observes with it), the target's forward over the drafts, and what is left:
judging and committing. The clocks count whoever is served; a router hears of them once a heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from pdspec.client import Access, RouterClient
from pdspec.study.cells.measures import PHASES

Reading = Mapping[str, Mapping[str, float]]  # by worker: seconds of the phases since its start, and verifications
_PATIENCE_S, _POLL_S = 5.0, 0.05


class WorkerClocks:
    """Of the router at ``endpoint``. Not shared between threads; close it, or use it in ``with``."""

    def __init__(self, endpoint: str, token: str = "") -> None:
        self._client = RouterClient(endpoint, Access(token=token))
        self._owed = 0  # verifications of answers that ended since the last reading
        self._last = 0.0  # verifications that the last reading had

    def answered(self, verifications: int) -> None:
        """So many more were made; the next reading has them."""
        self._owed += verifications

    def read(self) -> Reading | None:
        """The clocks once they include every answer that was told of; None where a router does not say so within
        seconds. Raises PdspecError."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            found = reading(self._client.workers())
            made = sum(clocks["verifications"] for clocks in found.values())
            if made >= self._last + self._owed or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        whole = made >= self._last + self._owed
        self._last, self._owed = made, 0
        return found if whole else None

    def close(self) -> None:
        """End the channel."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def reading(workers: list[dict[str, Any]]) -> Reading:
    """Of a router's listing: its decode workers."""
    return {
        worker["worker_id"] or worker["address"]: {
            **{phase: worker["metrics"].get(f"{phase}_seconds", 0.0) for phase in PHASES},
            "verifications": worker["metrics"].get("verifications", 0.0),
        }
        for worker in workers
        if worker["role"] == "decode"
    }


def between(before: Reading | None, after: Reading | None) -> dict[str, float] | None:
    """Seconds of each phase, of all workers together, and how many ``workers`` there are. None where a reading is
    missing, or a worker came, went or started anew meanwhile."""
    if before is None or after is None or before.keys() != after.keys() or not after:
        return None
    if any(after[name][phase] < before[name][phase] for name in after for phase in PHASES):
        return None
    sums = {phase: sum(after[name][phase] - before[name][phase] for name in after) for phase in PHASES}
    return {**sums, "workers": float(len(after))}
