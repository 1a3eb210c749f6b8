"""Prometheus metrics of each role: names with the prefix ``pdspec_``, listed in ``docs/metrics.md``.

A process has one set, of its role, in a registry of its own. Counters move once per chunk or once per answer, never per
token; gauges are read when somebody asks for them. ``exposed`` serves a registry over HTTP.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pdspec.errors import ConfigError, PdspecError
from pdspec.types import GenerationStats

log = logging.getLogger(__name__)
PREFIX = "pdspec"
_SHORT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
_TOKENS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0)
_LENGTHS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 16.0)


class _Set:
    """Metrics of one process; ``registry`` holds them and those of the process itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace=PREFIX, registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, namespace=PREFIX, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, help, labels, namespace=PREFIX, registry=self.registry, buckets=buckets)

    def _gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        Gauge(name, help, namespace=PREFIX, registry=self.registry).set_function(read)


class RouterMetrics(_Set):
    """What users see of their requests."""

    def __init__(
        self, *, running: Callable[[], int], workers: Callable[[], Mapping[tuple[str, str], int]],
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self._gauge("num_requests_running", "Requests that have begun and not ended.", running)
        self._gauge("num_requests_waiting", "Those of them that wait for a place.", waiting)
        self.registry.register(_Workers(workers))
        self.success = self._counter("request_success", "Answers that ended well.", "finish_reason")
        self.failure = self._counter("request_failure", "Requests that ended with an error.", "code")
        self.ttft = self._histogram("time_to_first_token_seconds", "From the request to its first token.", _LONG)
        self.itl = self._histogram(
            "inter_token_latency_seconds",
            "Between two messages of an answer, over the tokens of the later one.",
            _SHORT,
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "From the request to its last token.", _LONG)
        self.queue = self._histogram("request_queue_time_seconds", "In the queues of the workers.", _LONG)
        self.prefill = self._histogram("request_prefill_time_seconds", "Computing the prompt.", _LONG)
        self.decode = self._histogram("request_decode_time_seconds", "In decode steps.", _LONG)
        self.prompt = self._counter("prompt_tokens", "Prompt tokens of answers that ended.")
        self.generated = self._counter("generation_tokens", "Tokens sent to users.")
        self.replays = self._counter("request_replays", "Streams that went on with another decode worker.")
        self.placed = self._counter(
            "prefill_choices", "Prompts whose place measured times chose; unknown goes to a prefill worker.", "choice"
        )

    def watch(self, began: float) -> Watch:
        """Times of one request that came at ``began`` (``time.perf_counter``)."""
        return Watch(self, began)


@dataclass
class Watch:
    """One request as the router sees it."""

    metrics: RouterMetrics
    began: float
    last: float = 0.0

    def chunk(self, tokens: int, now: float) -> None:
        """``tokens`` went out at ``now``."""
        if not tokens:
            return
        self.metrics.generated.inc(tokens)
        if self.last:
            self.metrics.itl.observe((now - self.last) / tokens)
        else:
            self.metrics.ttft.observe(now - self.began)
        self.last = now

    def done(self, finish_reason: str, stats: Any, now: float) -> None:
        """The last message goes out; ``stats`` is a GenerationStats or the message of one."""
        metrics = self.metrics
        metrics.success.labels(finish_reason).inc()
        metrics.e2e.observe(now - self.began)
        metrics.prompt.inc(stats.prompt_tokens)
        metrics.replays.inc(stats.moves)
        for histogram, milliseconds in (
            (metrics.queue, stats.queue_ms),
            (metrics.prefill, stats.prefill_ms),
            (metrics.decode, stats.decode_ms),
        ):
            histogram.observe(milliseconds / 1e3)

    def failed(self, error: BaseException) -> None:
        """The request ended without an answer."""
        self.metrics.failure.labels(error.status if isinstance(error, PdspecError) else "CANCELLED").inc()


class WorkerMetrics(_Set):
    """What both kinds of workers have. ``pool`` returns (pages held, pages in all), ``prefix`` the counts of the prefix
    cache (``engine/prefix.py``); ``wire_kv`` names what handoffs make of target KV."""

    def __init__(
        self, *, running: Callable[[], int], waiting: Callable[[], int], pool: Callable[[], tuple[int, int]],
        prefix: Callable[[], Mapping[str, float]] = dict, wire_kv: str = "whole",
    ) -> None:  # fmt: skip
        super().__init__()
        self._target_kind = "target_kv" if wire_kv == "whole" else f"target_kv_lossy_{wire_kv}"
        self.registry.register(_Prefix(prefix))
        self._gauge("num_requests_running", "Requests that hold pages.", running)
        self._gauge("num_requests_waiting", "Requests that wait for pages.", waiting)
        self._gauge("kv_cache_usage_perc", "Share of the KV pages that is held; 1 is all.", lambda: _share(*pool()))
        self.prompt = self._counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self.queue = self._histogram("request_queue_time_seconds", "Until there were pages.", _LONG)
        self.moved = self._counter("transfer_bytes", "Bytes of handoffs, by what they are.", "kind")
        self.lost = self._counter("transfer_failures", "Handoffs that failed, by the kind of error.", "error")

    def transfer(self, *, kv: int, draft: int, hidden: int) -> None:
        """Bytes that one handoff moved."""
        for kind, count in ((self._target_kind, kv), ("draft_kv", draft), ("hidden", hidden)):
            if count:
                self.moved.labels(kind).inc(count)


class PrefillMetrics(WorkerMetrics):
    """Of a prefill worker."""

    def __init__(self, **reads: Any) -> None:
        super().__init__(**reads)
        self.prefill = self._histogram("request_prefill_time_seconds", "Computing a prompt.", _LONG)


class DecodeMetrics(WorkerMetrics):
    """Of a decode worker. ``engine`` returns (steps, seconds by phase), ``retracted`` (answers that are, retractions
    so far, bytes kept)."""

    def __init__(
        self, *, engine: Callable[[], tuple[int, Mapping[str, float]]],
        retracted: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0), **reads: Any,
    ) -> None:  # fmt: skip
        super().__init__(**reads)
        self.registry.register(_Engine(engine, lambda: retracted()[1]))
        self._gauge("num_requests_retracted", "Requests whose pages were taken.", lambda: retracted()[0])
        self._gauge("retracted_kv_bytes", "Host memory that their rows take.", lambda: retracted()[2])
        self.generated = self._counter("generation_tokens", "Output tokens.")
        self.landed = self._histogram(
            "transfer_seconds", "From the question to the last byte, prefill included.", _LONG
        )
        self.exposed = self._histogram(
            "transfer_exposed_seconds", "From the first token to the last byte: what decoding waits for.", _SHORT
        )
        self.retries = self._counter("prefill_retries", "Prefills that were asked of another worker.")
        self.rebuilds = self._counter("draft_rebuilds", "Draft states that were rebuilt here.")
        self.local = self._counter("local_prefills", "Prompts computed on this worker.")
        self.replays = self._counter("request_replays", "Answers that another worker had begun.")
        self.drafts = self._counter("spec_decode_num_drafts", "Verifications.", "drafter")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens that were verified.", "drafter")
        self.accepted = self._counter(
            "spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", "drafter"
        )
        self.reached_at = self._counter(
            "spec_decode_num_reached_per_pos", "Verifications that had a draft at a depth and accepted all above it.",
            "drafter", "position",
        )  # fmt: skip
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Verifications that accepted the draft at a depth.",
            "drafter", "position",
        )  # fmt: skip
        self.length = self._histogram(
            "spec_decode_acceptance_length", "Output tokens per verification, of one answer.", _LENGTHS, "drafter"
        )
        self.first = self._histogram(
            "spec_decode_first_accepted_tokens", "Drafted tokens accepted in the first verification after the handoff.",
            _TOKENS, "drafter",
        )  # fmt: skip
        self.rows = self._counter(
            "spec_decode_verified_rows", "Target rows of verifications: each root and its drafts."
        )
        self._tokens = self._verifications = 0
        self._tokens_of_rows = self._rows = 0.0
        self._gauge(
            "spec_decode_goodput_per_verified_row", "Output tokens per target row since the start.",
            lambda: _share(self._tokens_of_rows, self._rows),
        )  # fmt: skip

    def totals(self) -> tuple[int, int]:
        """(output tokens, verifications) of answers that ended."""
        return self._tokens, self._verifications

    def answer(self, stats: GenerationStats) -> None:
        """An answer has ended, whole or not; ``stats`` are its own."""
        drafter = stats.drafter or "none"
        self.prompt.inc(stats.prompt_tokens)
        self.generated.inc(stats.output_tokens)
        self._tokens += stats.output_tokens
        self._verifications += stats.verifications
        if not stats.verifications:
            return
        self.drafts.labels(drafter).inc(stats.verifications)
        self.drafted.labels(drafter).inc(stats.drafted_tokens)
        self.accepted.labels(drafter).inc(stats.accepted_tokens)
        self.length.labels(drafter).observe(stats.acceptance_length)
        self.first.labels(drafter).observe(stats.first_draft_accepted)
        for counter, found in ((self.reached_at, stats.reached_per_position),
                               (self.accepted_at, stats.accepted_per_position)):  # fmt: skip
            for position, count in enumerate(found):
                counter.labels(drafter, str(position)).inc(count)
        rows = stats.verifications + stats.drafted_tokens
        self.rows.inc(rows)
        self._rows += rows
        self._tokens_of_rows += stats.output_tokens - 1


class RelayMetrics(_Set):
    """Of a relay."""

    def __init__(self, *, running: Callable[[], int]) -> None:
        super().__init__()
        self._gauge("num_requests_running", "Streams under way.", running)
        self.moved = self._counter("relay_bytes", "Bytes of frames passed on to decode workers.")
        self.lost = self._counter("transfer_failures", "Streams that failed, by the kind of error.", "error")


class HttpMetrics(_Set):
    """Of the HTTP front."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self._counter("http_requests", "HTTP requests; 499: the client left.", "route", "status")
        self.seconds = self._histogram("http_request_seconds", "Of HTTP requests, streams included.", _LONG, "route")
        self.broken = self._counter("http_broken_streams", "Streams that ended with an error.", "error")


class _Engine(Collector):
    """Counters that the engine keeps itself."""

    def __init__(
        self, read: Callable[[], tuple[int, Mapping[str, float]]], retractions: Callable[[], int]
    ) -> None:
        self._read, self._retractions = read, retractions

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        steps, seconds = self._read()
        yield CounterMetricFamily(f"{PREFIX}_retractions", "Answers whose pages were taken.", value=self._retractions())
        yield CounterMetricFamily(f"{PREFIX}_decode_steps", "Decode steps.", value=steps)
        phases = CounterMetricFamily(
            f"{PREFIX}_decode_phase_seconds", "Time in each phase of a step.", labels=["phase"]
        )
        for name, value in seconds.items():
            phases.add_metric([name], value)
        yield phases


class _Prefix(Collector):
    """Counts of a prefix cache."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        counts = self._read()
        for name, key, text in (
            ("queries", "prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
            ("hits", "prefix_hit_tokens", "Prompt tokens whose KV was in it."),
            ("evictions", "prefix_evictions", "Pages that it gave up for others."),
        ):
            yield CounterMetricFamily(f"{PREFIX}_prefix_cache_{name}", text, value=counts.get(key, 0.0))
        family = Metric(f"{PREFIX}_prefix_cache_pages", "KV pages that it keeps.", "gauge")
        family.add_sample(family.name, {}, counts.get("prefix_cached_pages", 0.0))
        yield family


class _Workers(Collector):
    """Workers by role and state, counted when asked."""

    def __init__(self, read: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        family = Metric(f"{PREFIX}_workers", "Workers that the router knows.", "gauge")
        for (role, state), count in self._read().items():
            family.add_sample(f"{PREFIX}_workers", {"role": role, "state": state}, count)
        yield family


@contextlib.contextmanager
def exposed(metrics: _Set, *, host: str, port: int) -> Iterator[int]:
    """Serve ``metrics`` at ``http://host:port/metrics`` while the block runs and yield the port; −1: nowhere. Plain
    HTTP, without tokens: figures alone. Raises ConfigError for a port that is taken."""
    if port < 0:
        yield -1
        return
    try:
        server, thread = start_http_server(port, addr=host or "0.0.0.0", registry=metrics.registry)
    except OSError as error:
        remedy = "choose another, or 0 for any free one where several workers share a machine"
        message = f"cannot listen on {host}:{port}: {error.strerror}"
        raise ConfigError(message, field="metrics_port", remedy=remedy) from error
    log.info("metrics at http://%s:%d/metrics", host or "0.0.0.0", server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
