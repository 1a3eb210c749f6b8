"""Which prompts advance in the next step: first come, first served, up to a budget of tokens. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from pdspec.cache.pool import PagePool


class Prompt(Protocol):
    """What the scheduler knows of a sequence."""

    finished: bool
    num_pages: int  # it needs in all

    @property
    def pages(self) -> list[int]:
        """Those it holds."""

    @property
    def remaining(self) -> int:
        """Tokens still to be computed."""


P = TypeVar("P", bound=Prompt)


class PrefillScheduler(Generic[P]):
    """``waiting`` have no pages yet; ``running`` hold all they need. Pages come from ``take(prompt, count)``, which may
    find some of them in a cache."""

    def __init__(self, pool: PagePool, chunk: int, take: Callable[[P, int], list[int]] | None = None) -> None:
        self.pool, self.chunk = pool, chunk
        self._take = take or (lambda prompt, count: pool.allocate(count))
        self.waiting: deque[P] = deque()
        self.running: list[P] = []
        self.held: list[P] = []  # finished, but frames of theirs may still read the pages

    def add(self, prompt: P) -> None:
        """Queue a prompt. Raises PoolExhausted when it could never fit."""
        if prompt.num_pages > self.pool.num_pages:
            self.pool.allocate(prompt.num_pages)  # raises, and says how many there are
        self.waiting.append(prompt)

    def release(self, prompt: P) -> None:
        """Forget a prompt wherever it is and free its pages. Safe to repeat."""
        if prompt in self.waiting:
            self.waiting.remove(prompt)
        for group in (self.running, self.held):
            if prompt in group:
                group.remove(prompt)
                self.pool.release(prompt.pages)
                prompt.pages.clear()

    def plan(self) -> list[tuple[P, int]]:
        """Admit what fits, then (prompt, tokens) of the next step, at most ``chunk`` tokens together."""
        self.held += [prompt for prompt in self.running if prompt.finished]
        self.running = [prompt for prompt in self.running if not prompt.finished]
        while self.waiting and self.waiting[0].num_pages <= self.pool.free:
            prompt = self.waiting.popleft()
            prompt.pages.extend(self._take(prompt, prompt.num_pages))
            self.running.append(prompt)
        work, room = [], self.chunk
        for prompt in self.running:
            count = min(room, prompt.remaining)
            if count > 0:
                work.append((prompt, count))
                room -= count
        return work

    def check_integrity(self) -> None:
        """Every held page belongs to those who hold it, and to nobody else."""
        self.pool.check_integrity([prompt.pages for prompt in (*self.running, *self.held)])
