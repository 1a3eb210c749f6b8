"""``pdspec chaos overload``: four times as many requests as can be served, each with a deadline.

    capacity   ``crowd`` clients, more than are served at once, each asking again as soon as it has an answer or may
    overload   requests at ``times`` the rate of answers at capacity, at random moments, whatever becomes of them
    capacity   once more: the machine may have been faster or slower meanwhile

Goodput is answers that came whole before their deadline, per second, counted once a phase has been under way for half a
deadline. What cannot be served must be refused before any
work (RESOURCE_EXHAUSTED with ``grpc-retry-pushback-ms``), so that the goodput stays, and no memory grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from pdspec.config import WorkerConfig
from pdspec.study.stack import Stack
from pdspec.types import SamplingParams, UserRequest
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_channel
from pdspec.wire.codec import user_request_to_pb
from pdspec.wire.status import PUSHBACK_KEY

Progress = Callable[[str], object]
LEAST_GOODPUT = 0.9  # of that at capacity
REFUSED = "RESOURCE_EXHAUSTED"
OUTCOMES = {REFUSED: "refused", "DEADLINE_EXCEEDED": "late"}
MOST_GROWTH = 64 << 20  # bytes of RSS of one process, beyond what capacity needed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``seconds`` of overload at ``times`` capacity, and half as many of capacity before and after. ``patience``: a
    deadline is so many times what an answer takes beside those of ``clients``."""

    clients: int = 8
    crowd: int = 32
    times: float = 4.0
    seconds: float = 60.0
    tokens: int = 96
    patience: float = 2.0
    warm_s: float = 5.0
    seed: int = 0


@dataclass(kw_only=True)
class Seen:
    """What became of the requests of one phase that ended between two moments (monotonic seconds)."""

    begin: float
    end: float
    counts: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)  # seconds of answers in time
    refused_after: list[float] = field(default_factory=list)
    pushbacks: list[int] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Answers in time per second."""
        return self.counts["in_time"] / (self.end - self.begin)


def run(worker: WorkerConfig, plan: Plan, progress: Progress) -> dict[str, Any]:
    """One JSON object; ``ok`` says whether everything held, ``reasons`` what did not."""
    with Stack(worker, prefill=1, decode=1, progress=progress) as stack:
        return asyncio.run(_run(stack, worker, plan, progress))


async def _run(stack: Stack, worker: WorkerConfig, plan: Plan, progress: Progress) -> dict[str, Any]:
    async with make_channel(stack.endpoint) as channel:
        asker = Asker(channel, plan)
        progress("how long an answer takes")
        first = await asker.closed(plan.warm_s, clients=plan.clients)
        deadline = max(1.0, plan.patience * statistics.median(first.took))
        progress(f"capacity, deadline {deadline:.2f} s")
        before = await asker.closed(plan.seconds / 2, clients=plan.crowd, deadline_s=deadline)
        small = memory(stack)
        progress(f"{before.goodput:.2f} answers/s; {plan.times:g} times as many requests")
        rate = plan.times * max(before.goodput, 0.1)
        over, most = await asker.open(plan.seconds, rate=rate, deadline_s=deadline, stack=stack)
        progress(f"{over.goodput:.2f} answers/s in time; capacity again")
        after = await asker.closed(plan.seconds / 2, clients=plan.crowd, deadline_s=deadline)
    return _judge(worker, plan, deadline, (before, over, after), rate, (small, most))


class Asker:
    """All requests are of one kind; each has a seed of its own."""

    def __init__(self, channel: grpc.aio.Channel, plan: Plan) -> None:
        self._stub, self._plan, self._dice = rpc.RouterStub(channel), plan, random.Random(plan.seed)

    async def closed(self, seconds: float, *, clients: int, deadline_s: float = 0.0) -> Seen:
        """``clients`` that ask again at once, and after a refusal when they are told to."""
        seen = self._seen(seconds, deadline_s)

        async def client() -> None:
            while time.monotonic() < seen.end or not (deadline_s or seen.took):
                await asyncio.sleep(await self._one(seen, deadline_s))

        tasks = [asyncio.create_task(client()) for _ in range(clients)]
        await asyncio.sleep(seen.end - time.monotonic())
        if not deadline_s:  # to know what an answer takes needs one
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await _cancelled(tasks)
        return seen

    async def open(
        self, seconds: float, *, rate: float, deadline_s: float, stack: Stack
    ) -> tuple[Seen, dict[str, int]]:
        """Requests at ``rate`` per second; also the most memory that each process had."""
        seen, tasks, most = self._seen(seconds, deadline_s), list[asyncio.Task[float]](), memory(stack)
        looked = due = time.monotonic()
        while (now := time.monotonic()) < seen.end:
            while due <= now:  # however late this process wakes
                tasks.append(asyncio.create_task(self._one(seen, deadline_s)))
                due += self._dice.expovariate(rate)
            if now - looked > 1.0:
                looked, found = now, memory(stack)
                most = {name: max(most[name], found.get(name, 0)) for name in most}
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await _cancelled(tasks)
        return seen, most

    def _seen(self, seconds: float, deadline_s: float) -> Seen:
        begin = time.monotonic() + deadline_s / 2
        return Seen(begin=begin, end=begin + seconds)

    async def _one(self, seen: Seen, deadline_s: float) -> float:
        """Ask once. Returns how long to wait before the next question."""
        ids = tuple(self._dice.randrange(32, 123) for _ in range(24))
        params = SamplingParams(seed=self._dice.getrandbits(63), max_tokens=self._plan.tokens, ignore_eos=True)
        asked = user_request_to_pb(UserRequest(prompt_ids=ids, sampling=params))
        call, began, last, wait = self._stub.Generate(asked, timeout=deadline_s or None), time.monotonic(), "", 0.0
        code, trailing = "", {}
        try:
            async for message in call:
                last = message.finish_reason
        except grpc.aio.AioRpcError as error:
            code, trailing = error.code().name, dict(error.trailing_metadata() or ())
            wait = float(trailing.get(PUSHBACK_KEY, 100)) / 1e3 if code == REFUSED else 0.0
        finally:
            call.cancel()
        now = time.monotonic()
        if last and not deadline_s:  # however long it took
            seen.took.append(now - began)
            return wait
        if not seen.begin <= now <= seen.end:
            return wait
        seen.codes[code or "OK"] += 1
        seen.counts["in_time" if last else OUTCOMES.get(code, "failed")] += 1
        if last:
            seen.took.append(now - began)
        if code == REFUSED:
            seen.refused_after.append(now - began)
            seen.pushbacks += [int(trailing[PUSHBACK_KEY])] if PUSHBACK_KEY in trailing else []
        return wait


async def _cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def memory(stack: Stack) -> dict[str, int]:
    """Resident bytes of each process (Linux)."""
    found = {}
    for name, process in stack.processes.items():
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            found[name] = pages * 4096
    return found


def _judge(
    worker: WorkerConfig, plan: Plan, deadline: float, phases: tuple[Seen, Seen, Seen], rate: float,
    sizes: tuple[dict[str, int], dict[str, int]],
) -> dict[str, Any]:  # fmt: skip
    before, over, after = phases
    goodput = max(before.goodput, after.goodput)
    share = over.goodput / goodput if goodput else 0.0
    growth = {name: sizes[1][name] - sizes[0].get(name, 0) for name in sizes[1]}
    quick = sorted(over.refused_after)
    checks = {
        f"goodput is at least {LEAST_GOODPUT:g} of that at capacity": share >= LEAST_GOODPUT,
        "capacity is there before and after": min(before.goodput, after.goodput) > 0.5 * goodput,
        "what is too much is refused": over.counts["refused"] > 0,
        "every refusal says when to come back": len(over.pushbacks) == over.counts["refused"],
        "nothing failed otherwise": over.counts["failed"] == 0,
        "no process grew": max(growth.values()) <= MOST_GROWTH,
    }  # fmt: skip
    reasons = [f"not true: {name}" for name, holds in checks.items() if not holds]
    return {
        "ok": not reasons, "reasons": reasons, "model": worker.model, "drafter": worker.drafter,
        "tokens_each": plan.tokens, "clients_at_capacity": plan.crowd, "deadline_s": round(deadline, 3),
        "goodput_at_capacity": [round(before.goodput, 3), round(after.goodput, 3)],
        "goodput_under_overload": round(over.goodput, 3), "goodput_share": round(share, 3),
        "asked_per_s": round(rate, 2), "overload_s": round(over.end - over.begin, 1), "overload": dict(over.counts),
        "capacity_counts": dict(before.counts + after.counts), "codes": dict(over.codes),
        "refused_after_ms_p50": round(1e3 * quick[len(quick) // 2], 1) if quick else None,
        "refused_after_ms_p99": round(1e3 * quick[len(quick) * 99 // 100], 1) if quick else None,
        "pushback_ms_p50": statistics.median(over.pushbacks) if over.pushbacks else None,
        "rss_growth_mb": {name: round(count / 2**20, 1) for name, count in growth.items()},
    }  # fmt: skip
