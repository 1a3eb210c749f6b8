"""A clock that jumps from event to event, and machines whose cores busy workers share."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence


class Clock:
    """Events in order of time, those of one time in the order in which they were asked for. Seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """``call()`` at ``when``, or now where that is past."""
        heapq.heappush(self._events, (max(when, self.now), next(self._numbers), call))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()


class Job:
    """Work of one worker: ``work`` seconds at full speed, then ``done()``."""

    def __init__(self, machine: Machine, work: float, done: Callable[[], None]) -> None:
        self.work, self.done = work, done
        self._machine, self._ready, self._since, self._speed = machine, 0.0, machine.clock.now, 0.0
        self._version = 0

    @property
    def progress(self) -> float:
        """Seconds of it that are done."""
        return self._ready + (self._machine.clock.now - self._since) * self._speed

    def shorten(self, work: float) -> None:
        """There is less to do than was thought."""
        self.work = work
        self.schedule(self._speed)

    def schedule(self, speed: float) -> None:
        """From now on at ``speed``."""
        clock = self._machine.clock
        self._ready, self._since, self._speed = self.progress, clock.now, speed
        self._version += 1
        version = self._version
        clock.at(clock.now + max(0.0, self.work - self._ready) / speed, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version == self._version:
            self._machine.finish(self)


class Machine:
    """``speeds[n - 1]`` is the speed of each of n busy workers; beyond the table they share what its last entry has."""

    def __init__(self, clock: Clock, speeds: Sequence[float] = (1.0,)) -> None:
        self.clock, self._speeds = clock, tuple(speeds)
        self._jobs: list[Job] = []
        self.busy_s = 0.0  # of all its workers

    def start(self, work: float, done: Callable[[], None]) -> Job:
        """A worker begins something."""
        job = Job(self, work, done)
        self._jobs.append(job)
        self._rebalance(changed=job)
        return job

    def finish(self, job: Job) -> None:
        """It is done."""
        self.busy_s += job.work
        self._jobs.remove(job)
        self._rebalance()
        job.done()

    def _rebalance(self, changed: Job | None = None) -> None:
        count = len(self._jobs)
        if not count:
            return
        table = len(self._speeds)
        speed = self._speeds[min(count, table) - 1] * min(1.0, table / count if table > 1 else 1.0)
        for job in self._jobs:
            if job is changed or job._speed != speed:
                job.schedule(speed)
