"""``pdspec bench router``: what the router costs, with workers that compute nothing and chunks of one token each.

* **chunks**: many answers at once, as fast as they go; chunks per second, and CPU time per chunk of each process. The
  worker, the router and the client share this machine's cores, and every chunk makes both hops.
* **first token**: the same request asked of the router and of the worker itself, in turns, with nothing else under way.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc

from pdspec.client import RouterClient
from pdspec.study.processes import Running, cpu_seconds, process
from pdspec.types import GenerateRequest, Route, SamplingParams, UserRequest
from pdspec.wire.channels import make_channel, service_name
from pdspec.wire.codec import decode_request_to_pb, user_request_to_pb

Progress = Callable[[str], object]
ADDED_TTFT_MS, CHUNKS_PER_SECOND = 1.0, 8000.0  # what is promised
_WARM = 20


def run(
    *, model: str, streams: int, chunks: int, prompt_tokens: int, requests: int, runs: int, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """``streams`` answers of ``chunks`` chunks at once; ``requests`` of ``prompt_tokens`` ids for the first token."""
    with ExitStack() as stack:
        worker = stack.enter_context(process("pdspec.study.fake_worker"))
        flags = ("--port", "0", "--model", model, "--decode", worker.address, "--log-level", "warning")
        router = stack.enter_context(process("router", *flags))
        with RouterClient(router.address) as client:
            client.wait_ready()
        bench = Bench(worker, router)
        rows = []
        for _ in range(runs):
            rows.append(asyncio.run(bench.chunks(streams, chunks)))
            progress(f"{rows[-1]['chunks_per_second']:.0f} chunks/s, {rows[-1]['router_cpu_us']:.0f} µs of the router")
        first = asyncio.run(bench.first_token(prompt_tokens, requests))
        progress(f"first token: {first['router_ms']:.2f} ms through the router, {first['direct_ms']:.2f} without")
    table = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    floors = [
        {"name": "added_ttft_ms", "wanted": ADDED_TTFT_MS, "found": first["added_ms"],
         "ok": first["added_ms"] <= ADDED_TTFT_MS},
        {"name": "chunks_per_second", "wanted": CHUNKS_PER_SECOND, "found": table["chunks_per_second"],
         "ok": table["chunks_per_second"] >= CHUNKS_PER_SECOND},
    ]  # fmt: skip
    return {
        "ok": all(floor["ok"] for floor in floors), "floors": floors, "chunks": table, "runs": rows,
        "first_token": first, "streams": streams, "chunks_of_each": chunks,
    }  # fmt: skip


class Bench:
    """A worker, a router before it, and this process as their client."""

    def __init__(self, worker: Running, router: Running) -> None:
        self.worker, self.router = worker, router

    async def chunks(self, streams: int, chunks: int) -> dict[str, float]:
        """Rate and CPU microseconds per chunk."""
        channel = make_channel(self.router.address)
        try:
            await asyncio.gather(*(drain(channel, _user(8, _WARM)) for _ in range(streams)))
            pids = {"worker": self.worker.pid, "router": self.router.pid, "client": os.getpid()}
            before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.perf_counter()
            messages = await asyncio.gather(*(drain(channel, _user(8, chunks)) for _ in range(streams)))
            seconds, total = time.perf_counter() - began, streams * chunks
            cpu = {name: 1e6 * (cpu_seconds(pid) - before[name]) / total for name, pid in pids.items()}
        finally:
            await channel.close()
        return {
            "chunks_per_second": total / seconds, "messages_per_chunk": sum(messages) / total,
            **{f"{name}_cpu_us": value for name, value in cpu.items()},
        }  # fmt: skip

    async def first_token(self, prompt_tokens: int, requests: int) -> dict[str, float]:
        """Medians of both ways, and of their differences in turns."""
        through, straight = make_channel(self.router.address), make_channel(self.worker.address)
        times: dict[str, list[float]] = {"router": [], "direct": []}
        cpu = 0.0
        try:
            for index in range(requests + _WARM):
                if index == _WARM:
                    cpu = self.router.cpu_seconds()
                ways = [("router", through, _user(prompt_tokens, 1)), ("direct", straight, _worker(prompt_tokens))]
                for name, channel, call in ways[:: 1 if index % 2 else -1]:
                    began = time.perf_counter()
                    await drain(channel, call)
                    if index >= _WARM:
                        times[name].append(1e3 * (time.perf_counter() - began))
            cpu = self.router.cpu_seconds() - cpu
        finally:
            await through.close()
            await straight.close()
        added = [a - b for a, b in zip(times["router"], times["direct"], strict=True)]
        return {
            "router_ms": statistics.median(times["router"]), "direct_ms": statistics.median(times["direct"]),
            "added_ms": statistics.median(added), "added_p99_ms": sorted(added)[int(0.99 * (len(added) - 1))],
            "router_cpu_us": 1e6 * cpu / requests, "prompt_tokens": prompt_tokens,
        }  # fmt: skip


async def drain(channel: grpc.aio.Channel, call: tuple[str, bytes]) -> int:
    """Messages of one answer, read as bytes."""
    method, request = call
    answer, count = channel.unary_stream(method)(request), 0
    try:
        while await answer.read() is not grpc.aio.EOF:
            count += 1
        code = await answer.code()
        if code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(code, None, None, await answer.details())  # type: ignore[arg-type]
    finally:
        answer.cancel()
    return count


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1)


def _user(prompt_tokens: int, tokens: int) -> tuple[str, bytes]:
    ids = (7,) * prompt_tokens
    request = user_request_to_pb(UserRequest(prompt_ids=ids, drafter="none", sampling=_params(tokens)))
    return f"/{service_name('Router')}/Generate", request.SerializeToString()


def _worker(prompt_tokens: int) -> tuple[str, bytes]:
    asked = GenerateRequest(request_id="direct", prompt_ids=(7,) * prompt_tokens, sampling=_params(1))
    request = decode_request_to_pb(asked, Route(decode="", prefill=()))
    return f"/{service_name('DecodeWorker')}/Decode", request.SerializeToString()
