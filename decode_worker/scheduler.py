"""Who may hold pages and who decodes: one order of rank, one continuous batch. No torch.

    add ─▶ waiting ──(pages, a seat)──▶ granted ──join──▶ running ──release──▶ gone
                                           │ its prefill lands   │ ▲
                                           │ meanwhile     retract  resume, in order of rank
                                           ▲                     ▼ │
                                           └──(replayed)──── retracted: no pages, keeps its seat

With ``overcommit`` 1 a reservation holds all the pages that its answer can ever need, and nothing is ever retracted for
want of pages. Above 1 it begins with fewer and grows step by step. Whoever finds no page then takes those of answers of
lower rank, the cheapest first (``retraction.py``), or sits the step out. The answer of the highest rank is never taken
from, every other can be, and none is admitted that could not fill the pool alone: so one always advances.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from decode_worker.retraction import Rank, cheapest, rank
from pdspec.cache.pool import PagePool


class Reserved(Protocol):
    """What the scheduler knows of an answer."""

    number: int  # order of arrival, given by the scheduler

    @property
    def priority(self) -> int:
        """Higher goes first."""

    @property
    def num_pages(self) -> int:
        """It needs in all."""

    @property
    def pages(self) -> list[int]:
        """Those it holds."""

    @property
    def first_pages(self) -> int:
        """It begins with, where more is promised than there is."""

    @property
    def step_pages(self) -> int:
        """Its next step touches."""

    @property
    def paused(self) -> bool:
        """Its reader is behind: it does not step."""

    def retraction_s(self) -> float:
        """What it costs to take its pages away and to bring it back."""

    def grant(self) -> None:
        """Told once, when the pages are there."""


R = TypeVar("R", bound=Reserved)
R_in = TypeVar("R_in", bound=Reserved, contravariant=True)


class Keeper(Protocol[R_in]):
    """Where retracted answers are kept."""

    def park(self, item: R_in) -> None:
        """Its pages are about to be taken."""

    def unpark(self, item: R_in) -> bool:
        """It has pages again. False: it joins by itself, once what they held is computed anew."""


class DecodeScheduler(Generic[R]):
    """``max_batch`` bounds all but those that wait. ``overcommit``: times the pool that may be promised; ``watermark``:
    pages that stay free when an answer is admitted beside others. ``keeper`` None: nothing is retracted. The first
    pages come from ``take(item, count)``, which may find some of them in a cache."""

    def __init__(
        self, pool: PagePool, max_batch: int, take: Callable[[R, int], list[int]] | None = None, *,
        overcommit: float = 1.0, watermark: int = 0, keeper: Keeper[R] | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.max_batch, self.keeper = pool, max_batch, keeper
        self._take = take or (lambda item, count: pool.allocate(count))
        self.overcommit = overcommit if keeper is not None else 1.0
        self.watermark = watermark if self.overcommit > 1 else 0
        self.waiting: list[R] = []  # by rank
        self.granted: list[R] = []
        self.running: list[R] = []
        self.retracted: list[R] = []  # by rank
        self.retractions = 0
        self._arrivals = 0

    def add(self, item: R) -> None:
        """Queue a reservation, and grant it at once where there is room. Raises PoolExhausted when it never fits."""
        if item.num_pages > self.pool.num_pages:
            self.pool.allocate(item.num_pages)  # raises, and says how many there are
        item.number = self._arrivals
        self._arrivals += 1
        insort(self.waiting, item, key=rank)
        self.admit()

    def admit(self) -> None:
        """Grant and resume in order of rank; nobody overtakes. Answers whose readers are behind give way."""
        while (item := self._next()) is not None:
            back = item in self.retracted
            if not back and not self._may_begin(item):
                return
            while self._short(item, back) > 0:
                if not (idle := [one for one in self.running if one.paused]) or self.keeper is None:
                    return
                self.retract(max(idle, key=rank))
            if back:
                self._resume(item)
            else:
                self.waiting.remove(item)
                item.pages.extend(self._take(item, self._first(item)))
                self.granted.append(item)
                item.grant()

    def join(self, item: R) -> None:
        """The prefill has landed: decode from the next step on. A released item stays out."""
        if item in self.granted:
            self.granted.remove(item)
            self.running.append(item)

    def make_room(self) -> list[R]:
        """Those of the running batch that step now, each with the pages that its step touches."""
        if self.retracted or self.waiting:
            self.admit()
        ready = [item for item in self.running if not item.paused]
        if sum(max(0, item.step_pages - len(item.pages)) for item in ready) <= self.pool.free:
            for item in ready:
                self._grow(item)
            return ready
        stepping = [item for item in sorted(ready, key=rank) if self._room_for(item)]
        chosen = set(map(id, stepping))
        return [item for item in self.running if id(item) in chosen]

    def retract(self, item: R) -> None:
        """Take the pages of a running answer."""
        if self.keeper is None:
            raise ValueError("nobody keeps what is retracted")
        self.keeper.park(item)
        self.running.remove(item)
        self.pool.release(item.pages)
        item.pages.clear()
        insort(self.retracted, item, key=rank)
        self.retractions += 1

    def release(self, item: R) -> None:
        """Forget an item wherever it is and free its pages. Safe to repeat."""
        for queue in (self.waiting, self.retracted):
            if item in queue:
                queue.remove(item)
        for group in (self.granted, self.running):
            if item in group:
                group.remove(item)
                self.pool.release(item.pages)
                item.pages.clear()
        self.admit()

    def admitted(self) -> list[R]:
        """All that have a seat."""
        return [*self.granted, *self.running, *self.retracted]

    def check_integrity(self) -> None:
        """Every held page belongs to those who hold it, and to nobody else."""
        self.pool.check_integrity([item.pages for item in (*self.granted, *self.running)])

    def _next(self) -> R | None:
        """The highest rank that is to be let in."""
        back = next((item for item in self.retracted if not item.paused), None)
        new = self.waiting[0] if self.waiting else None
        if back is None or new is None:
            return back or new
        return min(back, new, key=rank)

    def _may_begin(self, item: R) -> bool:
        """Whether there is a seat, and not too much promised."""
        seated = self.admitted()
        promised = sum(one.num_pages for one in seated)
        return len(seated) < self.max_batch and (
            not seated or promised + item.num_pages <= self.overcommit * self.pool.num_pages
        )

    def _short(self, item: R, back: bool) -> int:
        """Pages that are missing to let ``item`` in; 0 or less: none. One that comes ``back`` leaves a page to each of
        the others, so that it does not have to go at once."""
        others = len(self.granted) + len(self.running)
        if not back:
            return self._first(item) + (self.watermark if others else 0) - self.pool.free
        wanted = item.num_pages if self.overcommit <= 1 else item.step_pages + max(self.watermark, others)
        return (wanted if others else item.step_pages) - self.pool.free

    def _first(self, item: R) -> int:
        return item.num_pages if self.overcommit <= 1 else item.first_pages

    def _resume(self, item: R) -> None:
        assert self.keeper is not None
        self.retracted.remove(item)
        item.pages.extend(self.pool.allocate(item.num_pages if self.overcommit <= 1 else item.step_pages))
        (self.running if self.keeper.unpark(item) else self.granted).append(item)

    def _room_for(self, item: R) -> bool:
        """Pages for the next step, taken from lower ranks where none is free."""
        if item not in self.running:
            return False  # retracted for one of higher rank
        while item.step_pages - len(item.pages) > self.pool.free:
            victim = cheapest(self._below(item))
            if victim is None:
                return False
            self.retract(victim)
        self._grow(item)
        return True

    def _below(self, item: R) -> Sequence[R]:
        mine: Rank = rank(item)
        return [one for one in self.running if rank(one) > mine]

    def _grow(self, item: R) -> None:
        if (short := item.step_pages - len(item.pages)) > 0:
            item.pages.extend(self.pool.allocate(short))
