"""What runs on a prefill worker's engine thread: prompts in the order of arrival, and the prefix cache."""

from __future__ import annotations

import dataclasses

from pdspec.config import WorkerConfig
from pdspec.engine.claims import Wake
from pdspec.engine.prefill import PrefillEngine, PrefillSequence
from pdspec.engine.prefix import Prefixes
from pdspec.engine.resources import load
from pdspec.engine.steptimes import measure_prompts
from pdspec.parallel.ranks import RankProcess, StartRank
from prefill_worker.scheduler import PrefillScheduler


@dataclasses.dataclass(kw_only=True, eq=False)
class QueuedPrompt(PrefillSequence):
    """A sequence with what the scheduler asks for."""

    num_pages: int
    queued_at: float
    limit: int | None = None  # rows from there on are computed, wherever else they are

    @property
    def pages(self) -> list[int]:
        """Its page ids."""
        return self.ctx.pages


class PrefillHost:
    """What runs on the engine thread."""

    def __init__(self, config: WorkerConfig, start: StartRank = RankProcess) -> None:
        self.resources = load(config, start)
        self.engine = PrefillEngine(self.resources)
        for tokens, seconds in measure_prompts(self.resources):
            self.engine.times.add(tokens, seconds)
        self.prefixes = Prefixes(self.resources)
        self.scheduler: PrefillScheduler[QueuedPrompt] = PrefillScheduler(self.resources.pool, config.chunk, self._take)

    def step(self) -> bool:
        """One prefill step; False when no prompt can advance."""
        work = self.scheduler.plan()
        if work:
            self.engine.step(work)
        for prompt, _ in work:
            if prompt.prefix is not None:
                self.prefixes.keep(prompt.prefix, prompt.ctx, rows=prompt.num_computed, made=prompt.draft_rows)
                if prompt.finished:
                    self.prefixes.claims.settle(prompt.prefix)
        return bool(work)

    def enter(self, prompt: QueuedPrompt, wake: Wake) -> bool:
        """Queue a prompt. False, and ``wake`` is called later, while another one computes KV that it needs, too. Raises
        PoolExhausted when it never fits."""
        prefix = prompt.prefix
        if prefix is not None and not self.prefixes.enter(prefix, prompt.ctx, wake, limit=prompt.limit):
            return False
        self.scheduler.add(prompt)
        return True

    def release(self, prompt: QueuedPrompt) -> None:
        """Forget a prompt wherever it is. Safe to repeat."""
        self.scheduler.release(prompt)
        if prompt.prefix is not None:
            self.prefixes.claims.settle(prompt.prefix)

    def _take(self, prompt: QueuedPrompt, count: int) -> list[int]:
        """Pages for a prompt, with what the cache has of it."""
        if prompt.prefix is None:
            return self.resources.pool.allocate(count)
        pages = self.prefixes.take(prompt.prefix, prompt.ctx, count, limit=prompt.limit)
        prompt.num_computed = prompt.prefix.start
        return pages

    def figures(self) -> dict[str, float]:
        """What prompts cost here, for Status; from any thread."""
        prompts = [*list(self.scheduler.waiting), *list(self.scheduler.running)]
        return {
            **self.engine.figures(), "prefill_backlog_tokens": float(sum(prompt.remaining for prompt in prompts)),
        }  # fmt: skip

    def check_integrity(self) -> None:
        """See scheduler."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        """Stop the kernels' threads."""
        self.resources.close()
