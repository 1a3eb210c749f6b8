"""One answer on a decode worker, from its reservation to its last token."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from pdspec.cache.parked import ParkedRows
from pdspec.cache.pool import pages_for
from pdspec.engine.prefill import PrefillSequence
from pdspec.engine.prefix import Prefix
from pdspec.engine.sequence import DecodeSequence
from pdspec.engine.thread import tell
from pdspec.spec.protocol import DraftContext, Drafter
from pdspec.types import GenerateRequest, TokenChunk


@dataclasses.dataclass(kw_only=True, eq=False)
class Answer:
    """``queue`` is read by its stream's coroutine; with ``buffer`` chunks delivered and not taken the answer pauses.
    ``rows`` are all that it can ever touch, ``scratch`` those behind the committed ones that one step may."""

    request: GenerateRequest
    ctx: DraftContext
    drafter: Drafter
    rows: int
    scratch: int
    headroom: int
    buffer: int
    page_size: int
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[TokenChunk | BaseException]
    room: asyncio.Future[None]
    queued_at: float
    cost: Callable[[Answer], float]  # of a retraction, seconds
    prefix: Prefix
    number: int = -1
    granted_at: float = 0.0
    sequence: DecodeSequence | None = None
    prompt: PrefillSequence | None = None  # where this worker prefills it
    first_sent: int = -1  # t_n, once the client has it
    parked: ParkedRows | None = None
    delivered: int = 0  # chunks: by the loop until it decodes, by the engine thread from then on
    taken: int = 0  # by the loop

    @property
    def pages(self) -> list[int]:
        """Page ids, empty before the grant and while it is retracted."""
        return self.ctx.pages

    @property
    def priority(self) -> int:
        """See GenerateRequest."""
        return self.request.priority

    @property
    def num_pages(self) -> int:
        """See Reserved."""
        return pages_for(self.rows, self.page_size)

    @property
    def first_pages(self) -> int:
        """Prompt, the first token, ``headroom`` tokens more, and what a step needs behind them."""
        return self._pages(self.ctx.prompt_len + self.headroom)

    @property
    def step_pages(self) -> int:
        """See Reserved."""
        return self._pages(self.ctx.root_position + 1)

    @property
    def paused(self) -> bool:
        """See Reserved."""
        return self.delivered - self.taken >= self.buffer

    @property
    def missing(self) -> int:
        """Prompt rows to be computed."""
        return self.ctx.prompt_len - self.prefix.start

    def left_s(self) -> float | None:
        """Seconds until its deadline, None where it has none."""
        if self.request.deadline_s is None:
            return None
        return max(0.001, self.request.deadline_s - (time.perf_counter() - self.queued_at))

    def retraction_s(self) -> float:
        """See Reserved."""
        return self.cost(self)

    def grant(self) -> None:
        """See Reserved."""
        self.granted_at = time.perf_counter()
        tell(self.loop, self._granted)

    def deliver(self, result: TokenChunk | BaseException) -> None:
        """Hand a result to the stream's coroutine, from the engine thread."""
        self.delivered += 1
        tell(self.loop, self.queue.put_nowait, result)

    def put(self, result: TokenChunk) -> None:
        """``deliver`` on the loop, before it decodes."""
        self.delivered += 1
        self.queue.put_nowait(result)

    def took(self) -> bool:
        """The coroutine has read one. Whether that ends a pause."""
        self.taken += 1
        return self.delivered - self.taken == self.buffer - 1

    def _granted(self) -> None:
        if not self.room.done():
            self.room.set_result(None)

    def _pages(self, committed: int) -> int:
        return pages_for(min(self.rows, committed + self.scratch), self.page_size)
