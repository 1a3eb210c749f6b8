"""What the simulated router knows of its workers, and the real policy that decides from it.

As in ``router.fleet``, a worker's counts are those of its last heartbeat, and requests that were sent or ended since
are added. All workers are asked at the same moments, so a heartbeat is a copy of arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pdspec.study.simulator.workers import PAGE, SimDecode, SimPrefill
from pdspec.types import Handoff, Route, WorkerInfo
from router.policy import WorkerState, WorkerView, choose

HEARTBEAT_S = 0.2
WHOLE = 32  # fleets up to this size are shown to the policy whole
_SHORT = 3


class Side:
    """The workers of one role."""

    def __init__(self, role: str, workers: list[SimDecode] | list[SimPrefill], pages: int) -> None:
        self.role, self.workers, self.pages = role, workers, pages
        count = len(workers)
        self.names = [f"{role}-{index}" for index in range(count)]
        self._now = np.zeros((3, count), np.int64)  # queued, running, free pages
        self._now[2] = pages
        self._seen = self._now.copy()
        self._sent, self._ended = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.beat, self._next = 0, HEARTBEAT_S

    def look(self, now: float) -> None:
        """Heartbeats that have passed. Nothing has changed since the last of them but what is noted next."""
        if now >= self._next:
            self.beat = int(now / HEARTBEAT_S)
            self._next = (self.beat + 1) * HEARTBEAT_S
            self._seen[:] = self._now
            self._sent[:] = self._ended[:] = 0

    def changed(self, index: int, now: float) -> None:
        """A worker's counts, as its Status says them."""
        self.look(now)
        scheduler = self.workers[index].scheduler
        running = len(scheduler.running) + len(getattr(scheduler, "granted", ()))
        self._now[:, index] = len(scheduler.waiting), running, scheduler.pool.free

    def send(self, index: int, now: float) -> Ticket:
        """See Fleet."""
        self.look(now)
        self._sent[index] += 1
        return Ticket(side=self, index=index, beat=self.beat)

    def close(self, ticket: Ticket, now: float) -> None:
        """The request has ended there."""
        self.look(now)
        counts = self._sent if ticket.beat == self.beat else self._ended
        counts[ticket.index] += -1 if ticket.beat == self.beat else 1

    def views(self, tokens: int) -> list[WorkerView]:
        """Of all; of a large fleet, those that the policy can choose, in order, and the one with the fewest waiting."""
        count = len(self.names)
        if count <= WHOLE:
            return [self.view(index) for index in range(count)]
        pending = self._sent - self._ended
        load = np.maximum(0, self._seen[0] + self._seen[1] + pending)
        waiting = np.maximum(0, self._seen[0] + pending)
        full = (self._seen[2] * PAGE < tokens) & (load > 0) if self.role == "decode" else np.zeros(count, bool)
        free = self._seen[2] if self.role == "decode" else 0
        rank = (full.astype(np.int64) << 60) + (load << 40) - free * (count + 1) + np.arange(count)
        short = set(np.argpartition(rank, _SHORT)[:_SHORT].tolist()) | {int(waiting.argmin())}
        return [self.view(index) for index in sorted(short)]

    def view(self, index: int) -> WorkerView:
        """One worker, as the router sees it."""
        queued, running, free = self._seen[:, index].tolist()
        info = WorkerInfo(
            worker_id=self.names[index], role=self.role, address=self.names[index], model="", fingerprint="",
            queued=queued, running=running, free_pages=free, total_pages=self.pages, page_size=PAGE,
        )  # fmt: skip
        return WorkerView(
            address=self.names[index], role=self.role, state=WorkerState.READY, info=info,
            pending=int(self._sent[index] - self._ended[index]),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Ticket:
    """A request that was sent, and in which heartbeat."""

    side: Side
    index: int
    beat: int


def route(prefill: Side, decode: Side, tokens: int, now: float) -> Route:
    """The real policy's choice. Raises as ``router.policy.choose``."""
    prefill.look(now)
    decode.look(now)
    return choose([*prefill.views(0), *decode.views(tokens)], handoff=Handoff.DIRECT, tokens=tokens)
