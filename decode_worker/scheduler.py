"""Who may hold pages and who decodes: reservations in order of arrival, one continuous batch. No torch.

    add ─▶ waiting ──(pages and a seat)──▶ granted ──join──▶ running ──release──▶ gone
                                              └── its prefill lands meanwhile ──┘

A reservation holds all the pages that its answer can ever need, so a running sequence never waits for memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from pdspec.cache.pool import PagePool


class Reserved(Protocol):
    """What the scheduler knows of an answer."""

    num_pages: int  # it needs in all

    @property
    def pages(self) -> list[int]:
        """Those it holds."""

    def grant(self) -> None:
        """Told once, when the pages are there."""


R = TypeVar("R", bound=Reserved)


class DecodeScheduler(Generic[R]):
    """``max_batch`` bounds granted and running together. Pages come from ``take(item, count)``, which may find some of
    them in a cache."""

    def __init__(self, pool: PagePool, max_batch: int, take: Callable[[R, int], list[int]] | None = None) -> None:
        self.pool, self.max_batch = pool, max_batch
        self._take = take or (lambda item, count: pool.allocate(count))
        self.waiting: deque[R] = deque()
        self.granted: list[R] = []
        self.running: list[R] = []

    def add(self, item: R) -> None:
        """Queue a reservation, and grant it at once where there is room. Raises PoolExhausted when it never fits."""
        if item.num_pages > self.pool.num_pages:
            self.pool.allocate(item.num_pages)  # raises, and says how many there are
        self.waiting.append(item)
        self.admit()

    def admit(self) -> None:
        """Grant in order of arrival; nobody overtakes."""
        while self.waiting and len(self.granted) + len(self.running) < self.max_batch:
            if self.waiting[0].num_pages > self.pool.free:
                return
            item = self.waiting.popleft()
            item.pages.extend(self._take(item, item.num_pages))
            self.granted.append(item)
            item.grant()

    def join(self, item: R) -> None:
        """The prefill has landed: decode from the next step on. A released item stays out."""
        if item in self.granted:
            self.granted.remove(item)
            self.running.append(item)

    def release(self, item: R) -> None:
        """Forget an item wherever it is and free its pages. Safe to repeat."""
        if item in self.waiting:
            self.waiting.remove(item)
        for group in (self.granted, self.running):
            if item in group:
                group.remove(item)
                self.pool.release(item.pages)
                item.pages.clear()
        self.admit()

    def check_integrity(self) -> None:
        """Every held page belongs to those who hold it, and to nobody else."""
        self.pool.check_integrity([item.pages for item in (*self.granted, *self.running)])
