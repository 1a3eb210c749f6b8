"""``pdspec chaos soak``: load for a long time, and whether any process grows.

    closed loop ─▶ capacity ─▶ open loop at a share of it: every family, tree and handoff, clients that leave
    every few seconds: resident bytes and open file descriptors of each process

A process is flat when the median of its last fifth is not above that of its second by more than a bound: the first is
for caches, heaps and pools to fill.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from pdspec.config import WorkerConfig
from pdspec.study.chaos_load import make_prompts, make_tasks
from pdspec.study.chaos_overload import memory
from pdspec.study.stack import Stack
from pdspec.types import UserRequest
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_channel
from pdspec.wire.codec import user_request_to_pb

Progress = Callable[[str], object]
MOST_GROWTH = 8 << 20  # bytes of one process
MOST_FDS = 4
GRACE_S = 60.0  # for what is under way when the load ends


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``warm_s`` of a closed loop of ``clients`` say what the deployment can serve."""

    minutes: float = 30.0
    load: float = 0.8
    tokens: int = 160
    clients: int = 16
    warm_s: float = 20.0
    look_s: float = 5.0
    leaving: float = 0.05  # share of requests whose client goes away in the middle
    requests: int = 600  # different ones
    seed: int = 0


@dataclass(kw_only=True)
class Sizes:
    """One process, look by look."""

    rss: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    @staticmethod
    def growth(values: Sequence[int]) -> float:
        """Median of the last fifth less that of the second."""
        fifth = max(1, len(values) // 5)
        return statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth] or values[:1])


def run(worker: WorkerConfig, plan: Plan, progress: Progress) -> dict[str, Any]:
    """One JSON object; ``ok`` says whether everything held, ``reasons`` what did not."""
    with Stack(worker, prefill=1, decode=1, progress=progress) as stack:
        return asyncio.run(_Soak(stack, worker, plan, progress).run())


class _Soak:
    def __init__(self, stack: Stack, worker: WorkerConfig, plan: Plan, progress: Progress) -> None:
        self.stack, self.worker, self.plan, self.progress = stack, worker, plan, progress
        self.dice = random.Random(plan.seed)
        prompts = make_prompts(self.dice, plan.requests, plan.tokens)
        self.asked = [_without_id(task.user) for task in make_tasks(
            self.dice, plan.requests, prompts, [None] * len(prompts), worker.drafters, 0)]  # type: ignore[list-item]
        self.counts, self.codes = Counter[str](), Counter[str]()
        self.sizes = {name: Sizes() for name in stack.processes}

    async def run(self) -> dict[str, Any]:
        """Capacity, then the load."""
        async with make_channel(self.stack.endpoint) as channel:
            self.stub = rpc.RouterStub(channel)
            self.progress(f"capacity, {self.plan.warm_s:g} s")
            capacity = await self._capacity()
            rate = self.plan.load * capacity
            self.progress(f"{capacity:.2f} answers/s; {rate:.2f} per second for {self.plan.minutes:g} minutes")
            self.counts.clear()
            await self._load(rate)
        return self._judge(capacity, rate)

    async def _capacity(self) -> float:
        until = time.monotonic() + self.plan.warm_s

        async def client() -> None:
            while time.monotonic() < until:
                await self._one(leave=False)

        await asyncio.gather(*(client() for _ in range(self.plan.clients)))
        return self.counts["completed"] / self.plan.warm_s

    async def _load(self, rate: float) -> None:
        tasks, began, told = set[asyncio.Task[None]](), time.monotonic(), 0.0
        due, looked, until = began, 0.0, began + 60 * self.plan.minutes
        while (now := time.monotonic()) < until:
            while due <= now:
                task = asyncio.create_task(self._one(leave=self.dice.random() < self.plan.leaving))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                due += self.dice.expovariate(rate)
            if now - looked >= self.plan.look_s:
                looked = now
                self._look()
            if now - told >= 60:
                told = now
                self.progress(f"{(now - began) / 60:.0f} min: {dict(self.counts)}, {len(tasks)} under way")
            await asyncio.sleep(max(0.0, min(due, until) - time.monotonic()))
        _, late = await asyncio.wait(tasks, timeout=GRACE_S) if tasks else (set(), set())
        self.counts["hung"] += len(late)

    async def _one(self, *, leave: bool) -> None:
        user = self.asked[self.dice.randrange(len(self.asked))]
        call, chunks, last = self.stub.Generate(user_request_to_pb(user)), 0, ""
        try:
            async for message in call:
                chunks, last = chunks + 1, message.finish_reason
                if leave and chunks > 3:
                    self.counts["left"] += 1
                    return
            self.counts["completed" if last else "cut"] += 1
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
            self.counts["failed"] += 1
        finally:
            call.cancel()

    def _look(self) -> None:
        for name, size in memory(self.stack).items():
            self.sizes[name].rss.append(size)
            with contextlib.suppress(OSError):
                self.sizes[name].fds.append(
                    sum(1 for _ in Path(f"/proc/{self.stack.processes[name].pid}/fd").iterdir())
                )

    def _judge(self, capacity: float, rate: float) -> dict[str, Any]:
        rss = {name: Sizes.growth(found.rss) for name, found in self.sizes.items()}
        fds = {name: Sizes.growth(found.fds) for name, found in self.sizes.items()}
        counts = self.counts
        checks = {
            "memory is flat": max(rss.values()) <= MOST_GROWTH,
            "file descriptors are flat": max(fds.values()) <= MOST_FDS,
            "nothing failed": not counts["failed"] and not counts["cut"] and not counts["hung"],
            "there was load": counts["completed"] > 0 and len(self.sizes["router"].rss) >= 10,
        }  # fmt: skip
        reasons = [f"not true: {name}" for name, holds in checks.items() if not holds]
        return {
            "ok": not reasons, "reasons": reasons, "model": self.worker.model, "drafters": list(self.worker.drafters),
            "minutes": self.plan.minutes, "capacity_per_s": round(capacity, 3), "asked_per_s": round(rate, 3),
            **{name: counts[name] for name in ("completed", "left", "failed", "cut", "hung")},
            "codes": dict(self.codes), "looks": len(self.sizes["router"].rss),
            "rss_growth_mb": {name: round(value / 2**20, 2) for name, value in rss.items()},
            "rss_mb": {name: [round(value / 2**20, 1) for value in _thinned(found.rss)]
                       for name, found in self.sizes.items()},
            "fds_growth": fds, "fds": {name: _thinned(found.fds) for name, found in self.sizes.items()},
        }  # fmt: skip


def _without_id(user: UserRequest) -> UserRequest:
    return replace(user, request_id="")


def _thinned(values: Sequence[int]) -> list[int]:
    """About twenty of them."""
    return list(values[:: max(1, len(values) // 20)])
