"""A trace on a simulated deployment: every request's times, and what is said of them together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pdspec.cache.pool import PoolExhausted, pages_for
from pdspec.errors import ConfigError, InvalidRequest, Overloaded
from pdspec.study.simulator.events import Clock, Machine
from pdspec.study.simulator.fleet import Side, Ticket, route
from pdspec.study.simulator.times import WorkerTimes, steps_of
from pdspec.study.simulator.traces import TraceRequest
from pdspec.study.simulator.workers import PAGE, SimAnswer, SimDecode, SimPrefill

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """``prefill`` 0: decode workers prefill. ``shared``: all workers stand on one machine, whose cores they share."""

    prefill: int = 1
    decode: int = 1
    kv_tokens: int = 65536  # of each worker
    max_batch: int = 64
    chunk: int = 512
    shared: bool = False


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a request must keep to count as good: seconds to its first token, seconds per later token."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05


class Simulation:
    """Run once."""

    def __init__(self, deployment: Deployment, times: WorkerTimes, seed: int = 0) -> None:
        if deployment.decode < 1 or deployment.prefill < 0:
            raise ConfigError("no decode worker", field="decode", remedy="simulate at least one")
        self.deployment, self.times = deployment, times
        self.clock = Clock()
        self.answers: list[SimAnswer] = []
        self.turned_away = self.too_long = 0
        self._random = np.random.default_rng(seed)
        self._chances = [np.array(row) for row in times.chances]
        pages = pages_for(deployment.kv_tokens, PAGE)
        machine = Machine(self.clock, times.speeds)
        self._prefill = Side("prefill", [], pages)
        self._decode = Side("decode", [], pages)
        self._places: dict[int, tuple[int, int]] = {}  # (decode, prefill) of an answer by its id
        self._tickets: dict[int, list[Ticket]] = {}

        def own() -> Machine:
            return machine if deployment.shared else Machine(self.clock)

        prefills = [
            SimPrefill(
                self.clock, own(), times, pages=pages, chunk=deployment.chunk, on_first=self._first,
                on_done=self._landed, changed=partial(self._changed, "prefill", index),
            ) for index in range(deployment.prefill)
        ]  # fmt: skip
        decodes = [
            SimDecode(
                self.clock, own(), times, pages=pages, max_batch=deployment.max_batch, chunk=deployment.chunk,
                on_first=self._first, on_end=self._ended, changed=partial(self._changed, "decode", index),
            ) for index in range(deployment.decode)
        ]  # fmt: skip
        self._prefill, self._decode = Side("prefill", prefills, pages), Side("decode", decodes, pages)
        self._prefills, self._decodes = prefills, decodes

    def run(self, trace: Sequence[TraceRequest]) -> None:
        """All requests, to the last token."""
        for request in trace:
            self.clock.at(request.arrival_s, partial(self._arrive, request))
        self.clock.run()

    def _arrive(self, request: TraceRequest) -> None:
        tokens = request.prompt + request.output
        try:
            chosen = route(self._prefill, self._decode, tokens, self.clock.now)
        except Overloaded:
            self.turned_away += 1
            return
        except InvalidRequest:
            self.too_long += 1
            return
        decode = int(chosen.decode.rpartition("-")[2])
        prefill = int(chosen.prefill[0].rpartition("-")[2]) if chosen.prefill else -1
        row = self._chances[int(self._random.integers(len(self._chances)))]
        answer = SimAnswer(
            request=request, verifications=steps_of(row, request.output - 1, self._random), granted=self._granted,
            num_pages=pages_for(tokens, PAGE), arrived=self.clock.now,
        )  # fmt: skip
        self._places[id(answer)] = decode, prefill
        self._tickets[id(answer)] = [self._decode.send(decode, self.clock.now)]
        if prefill >= 0:
            self._tickets[id(answer)].append(self._prefill.send(prefill, self.clock.now))
        self.answers.append(answer)
        self.clock.at(self.clock.now + self.times.request_s, partial(self._decodes[decode].add, answer))

    def _granted(self, answer: SimAnswer) -> None:
        decode, prefill = self._places[id(answer)]
        if prefill < 0:
            self._decodes[decode].prefill_here(answer)
            return
        try:
            self._prefills[prefill].add(answer)
        except PoolExhausted:
            self.too_long += 1
            self._ended(answer)

    def _first(self, answer: SimAnswer) -> bool:
        answer.first = self.clock.now
        for ticket in self._tickets[id(answer)][1:]:
            ticket.side.close(ticket, self.clock.now)
        if answer.verifications:
            return True
        answer.done = self.clock.now
        self._decodes[self._places[id(answer)][0]].release(answer)
        self._ended(answer)
        return False

    def _landed(self, answer: SimAnswer) -> None:
        self._decodes[self._places[id(answer)][0]].join(answer)

    def _ended(self, answer: SimAnswer) -> None:
        ticket = self._tickets.pop(id(answer))[0]
        ticket.side.close(ticket, self.clock.now)
        del self._places[id(answer)]

    def _changed(self, role: str, index: int) -> None:
        (self._prefill if role == "prefill" else self._decode).changed(index, self.clock.now)


def simulate(
    trace: Sequence[TraceRequest], deployment: Deployment, times: WorkerTimes, *, goal: Goal | None = None,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Throughput, latencies, and good requests per second where ``goal`` says what is good."""
    began = time.perf_counter()
    simulation = Simulation(deployment, times, seed)
    simulation.run(trace)
    done = [answer for answer in simulation.answers if answer.done >= 0]
    result = measured(
        [
            (one.arrived, one.first + times.request_s / 2, one.done + times.request_s / 2, one.request.output)
            for one in done
        ], goal,
    )  # fmt: skip
    return {
        "prefill": deployment.prefill, "decode": deployment.decode, **result, "turned_away": simulation.turned_away,
        "too_long": simulation.too_long, "queue_ms": latencies([one.started - one.arrived for one in done]),
        "simulated_s": simulation.clock.now, "wall_s": time.perf_counter() - began,
    }  # fmt: skip


def measured(rows: Sequence[tuple[float, float, float, int]], goal: Goal | None) -> dict[str, Any]:
    """Of (arrival, first token, last token, tokens) of each answer, in seconds."""
    if not rows:
        return {"requests": 0}
    ttft = [first - arrived for arrived, first, _, _ in rows]
    tpot = [(last - first) / (tokens - 1) for _, first, last, tokens in rows if tokens > 1]
    span = max(last for _, _, last, _ in rows) - min(arrived for arrived, _, _, _ in rows)
    found: dict[str, Any] = {
        "requests": len(rows), "tokens_per_second": sum(row[3] for row in rows) / span,
        "requests_per_second": len(rows) / span, "ttft_ms": latencies(ttft), "tpot_ms": latencies(tpot),
        "total_ms": latencies([last - arrived for arrived, _, last, _ in rows]),
    }  # fmt: skip
    if goal:
        good = sum(
            first - arrived <= goal.ttft_s and (last - first) <= goal.tpot_s * max(0, tokens - 1)
            for arrived, first, last, tokens in rows
        )
        found |= {"goodput": good / span, "good_share": good / len(rows)}
    return found


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    if not seconds:
        return {}
    return {f"p{p}": 1e3 * float(np.percentile(seconds, p)) for p in _PERCENTILES}
