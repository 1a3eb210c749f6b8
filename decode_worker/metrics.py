"""Where the metrics and the spans of a decode worker come from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from decode_worker.answer import Answer
from decode_worker.handoff import Handed
from decode_worker.host import DecodeHost
from pdspec.errors import PdspecError
from pdspec.metrics import DecodeMetrics
from pdspec.tracing import Tracer


def metrics_of(host: DecodeHost) -> DecodeMetrics:
    """Gauges read the scheduler and the pool whenever somebody asks; all reads are of single numbers."""
    scheduler, decode, pool = host.scheduler, host.decode, host.resources.pool
    return DecodeMetrics(
        running=lambda: len(scheduler.granted) + len(scheduler.running) + len(scheduler.retracted),
        retracted=lambda: (len(scheduler.retracted), scheduler.retractions, host.parking.held_bytes),
        waiting=lambda: len(scheduler.waiting),
        pool=lambda: (pool.held, pool.num_pages),
        prefix=host.prefixes.counts,
        wire_kv=host.resources.config.wire_kv,
        engine=lambda: (decode.steps, dict(decode.clocks)),
    )


def totals(host: DecodeHost, metrics: DecodeMetrics) -> dict[str, float]:
    """What Status tells of the work so far, running answers included: output tokens, verifications."""
    running = [answer.sequence for answer in host.scheduler.admitted() if answer.sequence is not None]
    ended_tokens, ended_verifications = metrics.totals()
    return {
        "generation_tokens": ended_tokens + sum(sequence.num_output for sequence in running),
        "verifications": ended_verifications + sum(sequence.verifications for sequence in running),
        "retractions": host.scheduler.retractions,
        "retracted": len(host.scheduler.retracted),
        **host.parking.counts,
    }


@contextlib.contextmanager
def handoff_counted(metrics: DecodeMetrics, handed: Handed) -> Iterator[None]:
    """Count one handoff, which ends with the block; ``handed`` is what it brings."""
    began = time.perf_counter()
    try:
        yield
        metrics.landed.observe(time.perf_counter() - began)
        if handed.exposed_ms:
            metrics.exposed.observe(handed.exposed_ms / 1e3)
    except PdspecError as error:
        metrics.lost.labels(type(error).__name__).inc()
        raise
    finally:
        metrics.transfer(kv=handed.kv_bytes, draft=handed.draft_kv_bytes, hidden=handed.hidden_bytes)


@dataclass(kw_only=True)
class Moments:
    """When an answer reached its phases (``time.perf_counter``); 0: it did not."""

    first: float = 0.0
    joined: float = 0.0

    def chunk(self) -> None:
        """One goes to the client."""
        self.first = self.first or time.perf_counter()

    def join(self) -> None:
        """Its handoff is complete."""
        self.joined = time.perf_counter()


def trace(tracer: Tracer | None, answer: Answer, moments: Moments, handed: Handed) -> None:
    """The spans of an answer that has ended."""
    if tracer is None:
        return
    request_id, now = answer.request.request_id, time.perf_counter()
    tracer.span("queue", request_id, answer.queued_at, answer.granted_at or now, pages=answer.num_pages)
    if not answer.granted_at:
        return
    tracer.span("prefill", request_id, answer.granted_at, moments.first or now, worker=handed.prefill_worker)
    if not moments.first:
        return
    tracer.span("first token", request_id, answer.queued_at, moments.first)
    if moments.joined:
        moved = handed.kv_bytes + handed.draft_kv_bytes + handed.hidden_bytes
        tracer.span("transfer", request_id, moments.first, moments.joined, bytes=moved)
    sequence = answer.sequence
    if sequence is not None:
        tracer.span(
            "decode", request_id, max(moments.first, moments.joined), now, drafter=answer.drafter.name,
            tokens=sequence.num_output, verifications=sequence.verifications, accepted=sequence.accepted,
        )  # fmt: skip
