"""Who may go to the workers now, who waits, and who is turned away: before anything was done for them.

    enter ─┬─ room ─────────────────────────▶ Place ──▶ (answer) ──▶ leave ─▶ the next ones
           ├─ in time later ─▶ fair queue ──▶ Place
           └─ too late, or too long a queue ─▶ Overloaded, with the time after which it is worth another try

Room is seats and KV tokens of the ready decode workers (``Capacity``). A request with a deadline begins only where it
is expected to end in time and to make nobody late who would not be; one that waits is turned away as soon as it could
not end in time even alone. All runs on the router's event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pdspec.config import RouterConfig
from pdspec.errors import DeadlineExceeded, Overloaded
from pdspec.types import GenerateRequest
from router.fairness import FairQueue, Waiting
from router.pace import Pace, Work, in_time, spoils, wait_s
from router.policy import WorkerState, WorkerView

PROBES = 8  # answers with deadlines at once while no pace is known
LEAST_PUSHBACK_MS, MOST_PUSHBACK_MS = 100, 30_000


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Of the decode workers that are ready; ``None``: one of them does not say."""

    seats: int | None
    tokens: int | None

    @classmethod
    def of(cls, views: Sequence[WorkerView]) -> Capacity:
        """What their Status says."""
        infos = [v.info for v in views if v.role == "decode" and v.state is WorkerState.READY and v.info]
        if not infos or not all(info.seats and info.overcommit for info in infos):
            return cls(seats=None, tokens=None)
        tokens = sum(int(info.total_pages * info.page_size * info.overcommit) for info in infos)
        return cls(seats=sum(info.seats for info in infos), tokens=tokens)

    def holds(self, places: int, tokens: int) -> bool:
        """Whether so much may be under way."""
        return (self.seats is None or places <= self.seats) and (self.tokens is None or tokens <= self.tokens)


@dataclass(kw_only=True, eq=False)
class Place:
    """A request that was let in."""

    turnstile: Turnstile
    tokens: int  # of KV that it may need
    most: int  # output tokens
    deadline: float | None  # on the loop's clock
    since: float
    sent: int = 0
    last: float = 0.0

    def chunk(self, tokens: int) -> None:
        """So many go to the client."""
        self.turnstile.saw(self, tokens)

    def work(self, share: float, now: float) -> Work:
        """What is left of it."""
        left = None if self.deadline is None else self.deadline - now
        return Work(tokens=max(1.0, self.most * share - self.sent), begun=self.sent > 0, left_s=left)


class Turnstile:
    """``views`` tells the fleet; ``poke`` is to be called when it has changed."""

    def __init__(self, config: RouterConfig, views: Callable[[], Sequence[WorkerView]]) -> None:
        self._config, self._views = config, views
        self.pace, self.queue = Pace(), FairQueue()
        self.inside: set[Place] = set()
        self.refused = 0

    def check(self, *, tokens: int, most: int, tenant: str, priority: int, left_s: float | None) -> None:
        """Raises Overloaded for a request that would not be let in, ever or in time. ``tokens``: of prompt and answer;
        ``most`` of the answer."""
        if not self._config.admission:
            return
        now, work = time.monotonic(), Work(tokens=most * self.pace.share, begun=False, left_s=left_s)
        running = self._running(now)
        if self._fits(tokens) and not len(self.queue):
            if (late := in_time(self.pace, work, running)) <= 0:
                return
            if not running:
                self._refuse(f"it would end {late:.1f} s after its deadline", late)
        place = self.queue.place(tokens=tokens, tenant=tenant, priority=priority)
        ahead = [Work(tokens=one.item.most * self.pace.share, begun=False) for one in self.queue.ahead(place)]
        wait = wait_s(self.pace, running, ahead)
        if len(self.queue) >= self._config.max_queue:
            self._refuse(f"{len(self.queue)} requests wait", wait)
        if wait > self._config.max_queue_s:
            self._refuse(f"it would wait {wait:.1f} s", wait - self._config.max_queue_s)
        if (late := in_time(self.pace, work, running, wait=wait)) > 0:
            self._refuse(f"it would end {late:.1f} s after its deadline", late)

    @asynccontextmanager
    async def entered(self, request: GenerateRequest, tenant: str, began: float) -> AsyncIterator[Place]:
        """Wait for a place and have it while the block runs. ``began``: ``time.monotonic`` at which the request's
        ``deadline_s`` counts from. Raises Overloaded and DeadlineExceeded."""
        sampling = request.sampling
        tokens = len(request.prompt_ids) + sampling.max_tokens
        deadline = None if request.deadline_s is None else began + request.deadline_s
        left = None if deadline is None else deadline - time.monotonic()
        self.check(
            tokens=tokens, most=sampling.max_tokens, tenant=tenant, priority=request.priority, left_s=left
        )  # fmt: skip
        place = Place(turnstile=self, tokens=tokens, most=sampling.max_tokens, deadline=deadline, since=0.0)
        if not self._config.admission or (not len(self.queue) and self._may_begin(place)):
            self._let_in(place)
        else:
            await self._wait(place, tenant, request.priority)
        try:
            yield place
        finally:
            self.inside.discard(place)
            self._left(place)
            self.poke()

    def _left(self, place: Place) -> None:
        """It ended, or was given up: how long it had waited in vain says as much as what came."""
        if not place.since:
            return
        if place.sent:
            self.pace.ended(place.sent, place.most)
        elif (waited := time.monotonic() - place.since) > self.pace.first_s:
            self.pace.first(waited)

    def saw(self, place: Place, tokens: int) -> None:
        """``tokens`` of an answer went out."""
        now = time.monotonic()
        if not tokens:
            return
        if place.sent:
            self.pace.chunk(tokens, now - place.last, len(self.inside))
        else:
            self.pace.first(now - place.since)
        place.sent, place.last = place.sent + tokens, now

    def poke(self) -> None:
        """Let in whoever may begin now, in order; turn away those that cannot end in time any more."""
        while (entry := self.queue.first()) is not None:
            waiter: _Waiter = entry.item
            if waiter.future.done():
                self.queue.remove(entry)
                continue
            if not self._may_begin(waiter.place):
                work = waiter.place.work(self.pace.share, time.monotonic())
                if (late := in_time(self.pace, work, ())) <= 0:
                    return
                self.queue.remove(entry)
                waiter.future.set_exception(self._overloaded(f"it would end {late:.1f} s after its deadline", late))
                continue
            self.queue.pop()
            self._let_in(waiter.place)
            waiter.future.set_result(None)

    async def _wait(self, place: Place, tenant: str, priority: int) -> None:
        waiter = _Waiter(place=place, most=place.most, future=asyncio.get_running_loop().create_future())
        entry: Waiting = self.queue.push(waiter, tokens=place.tokens, tenant=tenant, priority=priority)
        limits = [2 * self._config.max_queue_s]
        if place.deadline is not None:
            limits.append(place.deadline - time.monotonic())
        try:
            async with asyncio.timeout(min(limits)):
                await waiter.future
        except TimeoutError:
            if min(limits) == limits[0]:
                raise self._overloaded(f"it waited {limits[0]:g} s for a place", 1.0) from None
            raise DeadlineExceeded("its time was over before it had a place", field="deadline") from None
        except BaseException:
            self.inside.discard(place)  # let in, and gone in the same moment
            raise
        finally:
            self.queue.remove(entry)

    def _let_in(self, place: Place) -> None:
        place.since = time.monotonic()
        self.inside.add(place)

    def _fits(self, tokens: int) -> bool:
        capacity = Capacity.of(self._views())
        return not self.inside or capacity.holds(len(self.inside) + 1, tokens + sum(one.tokens for one in self.inside))

    def _may_begin(self, place: Place) -> bool:
        if not self._fits(place.tokens):
            return False
        if place.deadline is None:
            return True
        if not self.pace.known:
            return len(self.inside) < PROBES
        now = time.monotonic()
        running = self._running(now)
        work = place.work(self.pace.share, now)
        return not running or (in_time(self.pace, work, running) <= 0 and not spoils(self.pace, running))

    def _running(self, now: float) -> list[Work]:
        return [place.work(self.pace.share, now) for place in self.inside]

    def _refuse(self, why: str, seconds: float) -> None:
        raise self._overloaded(why, seconds)

    def _overloaded(self, why: str, seconds: float) -> Overloaded:
        self.refused += 1
        pushback = int(min(max(1e3 * seconds, LEAST_PUSHBACK_MS), MOST_PUSHBACK_MS))
        return Overloaded(why, retry_after_ms=pushback, remedy=f"try again in {pushback} ms")


@dataclass(frozen=True, kw_only=True)
class _Waiter:
    place: Place
    most: int
    future: asyncio.Future[None]
