"""The requests under way, for ``pdspec top``, and what the router counts of each."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pdspec.metrics import RouterMetrics
from pdspec.tracing import Tracer
from pdspec.types import GenerateRequest
from pdspec.wire import pdspec_pb2 as pb

ID_BYTES = 4


class LiveRequests:
    """By arrival. ``watched`` wraps an answer's chunks; counting costs microseconds per chunk."""

    def __init__(self, metrics: RouterMetrics, tracer: Tracer | None = None) -> None:
        self._metrics, self._tracer = metrics, tracer
        self._live: dict[int, tuple[GenerateRequest, float, list[int]]] = {}

    async def watched(
        self, request: GenerateRequest, began: float, chunks: AsyncGenerator[pb.GenerateChunk, None]
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """``chunks`` as they are, each counted before it goes on. ``began``: ``time.perf_counter`` of the call."""
        watch, sent, over, failure = self._metrics.watch(began), [0], False, ""
        self._live[id(sent)] = (request, began, sent)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    now, tokens = time.perf_counter(), len(chunk.token_ids) // ID_BYTES
                    sent[0] += tokens
                    watch.chunk(tokens, now)
                    if chunk.finish_reason:
                        over = True
                        watch.done(chunk.finish_reason, chunk.stats, now)
                    yield chunk
        except BaseException as error:
            if not over:
                failure = type(error).__name__
                watch.failed(error)
            raise
        finally:
            del self._live[id(sent)]
            if self._tracer:
                name, ended = request.request_id, time.perf_counter()
                self._tracer.root("request", name, began, ended, error=failure, tokens=sent[0], drafter=request.drafter)

    def __len__(self) -> int:
        return len(self._live)

    def to_pb(self) -> list[pb.RequestStatus]:
        """For ListWorkers."""
        now = time.perf_counter()
        return [
            pb.RequestStatus(
                request_id=request.request_id,
                drafter=request.drafter,
                prompt_tokens=len(request.prompt_ids),
                output_tokens=sent[0],
                max_tokens=request.sampling.max_tokens,
                age_s=now - began,
            )
            for request, began, sent in list(self._live.values())
        ]
