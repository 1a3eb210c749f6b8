"""Where retracted answers are kept: their rows in host memory, or nothing but their tokens, whichever costs less.

Kept: target KV, draft KV and the drafter's state; the seed and the tokens never left. Replayed: the rows of prompt and
answer are computed anew as one prompt, whose next token must be the one the client has (DESIGN 5: the same bits).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from decode_worker.retraction import Costs, Way
from pdspec.cache.parked import park_rows, parked_bytes, unpark_rows
from pdspec.engine.local import Kept, new_context
from pdspec.engine.prefill import PrefillSequence
from pdspec.engine.resources import Resources
from pdspec.types import DraftPrefill, Verify

if TYPE_CHECKING:
    from decode_worker.answer import Answer

COUNTED = ("retractions_kept", "retractions_replayed", "retracted_bytes", "retract_memory_exceeded", "resumed")


class Parking:
    """On the engine thread. ``memory``: bytes that may be kept; ``begin`` starts the prefill of a replay."""

    def __init__(self, resources: Resources, memory: int, begin: Callable[[Answer], None]) -> None:
        self._resources, self._memory, self._begin = resources, memory, begin
        self._exact = resources.fingerprint["numerics"] != "fast"
        self.costs = Costs()
        self.held_bytes = 0
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))

    def retraction_s(self, answer: Answer) -> float:
        """Seconds that the cheaper way takes."""
        nbytes = parked_bytes(self._resources.cache, self._rows(answer))
        kept = self.costs.keep(nbytes)
        return min(kept, self.costs.replay(answer.ctx.root_position)) if self._repeats(answer) else kept

    def park(self, answer: Answer) -> None:
        """See Keeper."""
        rows, cache = self._rows(answer), self._resources.cache
        nbytes, room = parked_bytes(cache, rows), self._memory - self.held_bytes
        way = self.costs.way(nbytes=nbytes, rows=answer.ctx.root_position, room=room, exact=self._repeats(answer))
        if way is Way.REPLAY:
            self.counts["retractions_replayed"] += 1
            return
        began = time.perf_counter()
        answer.parked = park_rows(cache, answer.pages, rows)
        self.costs = self.costs.copied(nbytes, time.perf_counter() - began)
        self.held_bytes += nbytes
        self.counts["retractions_kept"] += 1
        self.counts["retracted_bytes"] += nbytes
        self.counts["retract_memory_exceeded"] += nbytes > room

    def unpark(self, answer: Answer) -> bool:
        """See Keeper."""
        self.counts["resumed"] += 1
        if answer.parked is None:
            self._replay(answer)
            return False
        cache = self._resources.cache
        if self._resources.config.poison:
            cache.poison(None, answer.pages, 0, len(answer.pages) * cache.page_size)
        began = time.perf_counter()
        unpark_rows(cache, answer.pages, answer.parked)
        self.costs = self.costs.copied(answer.parked.nbytes, time.perf_counter() - began)
        self.forget(answer)
        return True

    def forget(self, answer: Answer) -> None:
        """Its rows are not needed any more. Safe to repeat."""
        if answer.parked is not None:
            self.held_bytes -= answer.parked.nbytes
            answer.parked = None

    def _rows(self, answer: Answer) -> Mapping[str, int]:
        committed = answer.ctx.root_position
        return {self._resources.runner.group.name: committed, **answer.drafter.rows_at(committed)}

    def _repeats(self, answer: Answer) -> bool:
        """Whether a replay gives the same tokens: drafts change nothing under coupling, and rows have the same bits."""
        params = answer.request.sampling
        coupled = params.verify in (Verify.COUPLED, Verify.GREEDY) or params.temperature == 0
        return self._exact and coupled

    def _replay(self, answer: Answer) -> None:
        """All rows again, as those of one longer prompt; its first token is the root."""
        sequence, request, ctx = answer.sequence, answer.request, answer.ctx
        assert sequence is not None
        done = sequence.num_output - 1
        longer = replace(
            request, prompt_ids=tuple(ctx.token_ids[:-1]), replayed=request.replayed + done,
            sampling=replace(request.sampling, max_tokens=request.sampling.max_tokens - done),
        )  # fmt: skip
        answer.prompt = PrefillSequence(
            request=longer, ctx=replace(new_context(self._resources, longer, ctx.pages), tree=ctx.tree),
            drafter=answer.drafter, draft_prefill=DraftPrefill.PREFILL, events=Kept(), ship_rows=False,
        )  # fmt: skip
        self._begin(answer)
