"""Simulated workers around the schedulers of the real ones. Decode steps between two changes of a batch are one event:
their times grow by the KV that each step adds, so their sum has a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from decode_worker.scheduler import DecodeScheduler
from pdspec.cache.pool import PagePool, PoolExhausted, pages_for
from pdspec.study.simulator.events import Clock, Job, Machine
from pdspec.study.simulator.times import WorkerTimes
from pdspec.study.simulator.traces import TraceRequest
from prefill_worker.scheduler import PrefillScheduler

PAGE = 64
_MARGIN = 1e-9  # seconds; what floating point may add up to


class CountedPool(PagePool):
    """Pages that are only counted: one entry of a page list stands for all pages of one allocation."""

    def __init__(self, num_pages: int, page_size: int = PAGE) -> None:
        super().__init__(1, page_size)
        self.num_pages, self._left = num_pages, num_pages

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self._left

    def allocate(self, count: int) -> list[int]:
        """[count]. Raises PoolExhausted."""
        if count > self._left:
            raise PoolExhausted(f"{count} KV pages wanted, {self._left} of {self.num_pages} free")
        self._left -= count
        return [count]

    def release(self, pages: Sequence[int]) -> None:
        """What ``allocate`` gave."""
        self._left += sum(pages)


@dataclass(kw_only=True, eq=False)
class SimAnswer:
    """A request from its arrival to its last token, as the decode scheduler sees it. Times in seconds; -1: not yet."""

    request: TraceRequest
    verifications: int
    granted: Callable[[SimAnswer], None]
    num_pages: int = 0
    pages: list[int] = field(default_factory=list)
    priority: int = 0
    number: int = 0
    paused: bool = False
    arrived: float = 0.0
    started: float = -1.0  # its prefill
    first: float = -1.0
    done: float = -1.0
    joined_at: int = 0  # the worker's step count
    computed: int = 0  # prompt tokens, where the decode worker prefills

    @property
    def first_pages(self) -> int:
        """All are reserved at once."""
        return self.num_pages

    @property
    def step_pages(self) -> int:
        """It has all it needs."""
        return self.num_pages

    def retraction_s(self) -> float:
        """It is never retracted: nothing is promised that is not there."""
        return math.inf

    def grant(self) -> None:
        """See Reserved."""
        self.granted(self)

    @property
    def last_step(self) -> int:
        """The worker's step count after which it is done."""
        return self.joined_at + self.verifications

    def kv_tokens(self, step: int) -> float:
        """Rows it has before a step; it gains as many in each."""
        return self.request.prompt + (step - self.joined_at) * self.gain

    @property
    def gain(self) -> float:
        """Tokens of one of its verifications, on average."""
        return (self.request.output - 1) / max(1, self.verifications)


@dataclass(kw_only=True, eq=False)
class SimPrompt:
    """One prompt, as the prefill scheduler sees it."""

    answer: SimAnswer
    num_pages: int
    pages: list[int] = field(default_factory=list)
    finished: bool = False
    computed: int = 0

    @property
    def remaining(self) -> int:
        """See Prompt."""
        return self.answer.request.prompt - self.computed


class SimPrefill:
    """``on_first(answer)`` is told with the prompt's last step, ``on_done(answer)`` when its KV has landed."""

    def __init__(
        self, clock: Clock, machine: Machine, times: WorkerTimes, *, pages: int, chunk: int,
        on_first: Callable[[SimAnswer], bool], on_done: Callable[[SimAnswer], None],
        changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.clock, self.machine, self.times = clock, machine, times
        self.scheduler: PrefillScheduler[SimPrompt] = PrefillScheduler(CountedPool(pages), chunk)
        self._on_first, self._on_done, self._changed = on_first, on_done, changed
        self._busy = False
        self._link_free = 0.0

    def add(self, answer: SimAnswer) -> None:
        """A prompt arrives. Raises PoolExhausted when it can never fit."""
        self.scheduler.add(SimPrompt(answer=answer, num_pages=pages_for(answer.request.prompt + 1, PAGE)))
        self._start()
        self._changed()

    def _start(self) -> None:
        if self._busy or not (work := self.scheduler.plan()):
            return
        self._busy = True
        for prompt, _ in work:
            if prompt.answer.started < 0:
                prompt.answer.started = self.clock.now
        seconds = self.times.prefill([(prompt.computed, count) for prompt, count in work])
        self.machine.start(seconds, lambda: self._stepped(work))

    def _stepped(self, work: list[tuple[SimPrompt, int]]) -> None:
        self._busy = False
        for prompt, count in work:
            prompt.computed += count
            if not prompt.remaining:
                prompt.finished = True
                self._hand_over(prompt)
        self._start()
        self._changed()

    def _hand_over(self, prompt: SimPrompt) -> None:
        """The rows of a layer travel while the next is computed: the last layer's are left, or more on a slow link."""
        answer, times = prompt.answer, self.times
        if not self._on_first(answer):
            self.scheduler.release(prompt)
            return
        landed = self.clock.now
        if times.link:
            seconds = answer.request.prompt * times.kv_token_bytes / times.link
            self._link_free = max(self._link_free, answer.started) + seconds
            landed = max(landed + seconds / times.layers, self._link_free)
        self.clock.at(landed + times.handoff_s, lambda: self._landed(prompt))

    def _landed(self, prompt: SimPrompt) -> None:
        self.scheduler.release(prompt)
        self._on_done(prompt.answer)
        self._start()
        self._changed()


class SimDecode:
    """``on_first`` and ``on_end`` are told of answers that it prefills itself, and of those that are complete."""

    def __init__(
        self, clock: Clock, machine: Machine, times: WorkerTimes, *, pages: int, max_batch: int, chunk: int,
        on_first: Callable[[SimAnswer], bool], on_end: Callable[[SimAnswer], None], changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.clock, self.machine, self.times, self.chunk = clock, machine, times, chunk
        self.scheduler: DecodeScheduler[SimAnswer] = DecodeScheduler(CountedPool(pages), max_batch)
        self.prompts: list[SimAnswer] = []
        self.steps = 0
        self._on_first, self._on_end, self._changed = on_first, on_end, changed
        self._job: Job | None = None
        self._first_s = self._more_s = 0.0  # of the segment's first step, and what each later one takes more
        self._count = 0
        self._batch: list[SimAnswer] = []

    def add(self, answer: SimAnswer) -> None:
        """A reservation. Raises PoolExhausted when it can never fit."""
        self.scheduler.add(answer)
        self._changed()

    def prefill_here(self, answer: SimAnswer) -> None:
        """See DecodeHost."""
        self.prompts.append(answer)
        self._cut()

    def join(self, answer: SimAnswer) -> None:
        """It decodes from the next step on."""
        self.scheduler.join(answer)
        answer.joined_at = -1
        self._cut()
        self._changed()

    def release(self, answer: SimAnswer) -> None:
        """Its first token was its last."""
        self.scheduler.release(answer)
        self._changed()

    def _cut(self) -> None:
        """End the segment with the step at hand, or begin one."""
        if self._job is None:
            self._start()
            return
        count = self._steps_in(self._job.progress)
        if count < self._count:
            self._count = count
            self._job.shorten(self._seconds(count))

    def _seconds(self, count: int) -> float:
        return count * self._first_s + self._more_s * count * (count - 1) / 2

    def _steps_in(self, progress: float) -> int:
        """The step at hand, counted from 1, after so many seconds of the segment."""
        first, more = self._first_s - self._more_s / 2, self._more_s
        if more <= 0:
            whole = progress / first
        else:
            whole = (math.sqrt(first * first + 2 * more * progress) - first) / more
        return max(1, math.ceil(whole - _MARGIN))

    def _start(self) -> None:
        batch = self._batch = list(self.scheduler.running)
        chunk_s = self._chunk_seconds()
        if not batch:
            if chunk_s:
                self._first_s, self._more_s, self._count = chunk_s, 0.0, 1
                self._job = self.machine.start(chunk_s, self._stepped)
            return
        gain = kv = 0.0
        for answer in batch:
            if answer.joined_at < 0:
                answer.joined_at = self.steps
            gain, kv = gain + answer.gain, kv + answer.kv_tokens(self.steps)
        self._count = 1 if chunk_s else max(1, min(answer.last_step for answer in batch) - self.steps)
        self._first_s = self.times.step(len(batch), kv) + chunk_s
        self._more_s = gain * self.times.kv_token_s
        self._job = self.machine.start(self._seconds(self._count), self._stepped)

    def _chunk_seconds(self) -> float:
        if not self.prompts:
            return 0.0
        answer = self.prompts[0]
        if answer.started < 0:
            answer.started = self.clock.now
        return self.times.prefill([(answer.computed, min(self.chunk, answer.request.prompt - answer.computed))])

    def _stepped(self) -> None:
        self._job = None
        if self._batch:
            self.steps += self._count
        if self.prompts:
            self._prefilled()
        for answer in self._batch:
            if answer.last_step <= self.steps:
                answer.done = self.clock.now
                self.scheduler.release(answer)
                self._on_end(answer)
        self._changed()
        if self._job is None:
            self._start()

    def _prefilled(self) -> None:
        answer = self.prompts[0]
        answer.computed += min(self.chunk, answer.request.prompt - answer.computed)
        if answer.computed < answer.request.prompt:
            return
        self.prompts.pop(0)
        if self._on_first(answer):
            self.scheduler.join(answer)
            answer.joined_at = -1
