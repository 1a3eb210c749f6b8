"""``pdspec bench stream``: what the movers carry, between two processes of this machine.

* **raw**: frames of 2 MiB without checksums; through shared memory each payload is copied in and copied out.
* **handoff**: a prompt's rows out of pages and into pages, hashed on both sides, as every handoff is.

Over gRPC on the loopback, through a relay, and through shared memory, in turns. Floors: what a plain socket carries,
and what one core copies.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.config import WorkerConfig
from pdspec.model.files import resolve
from pdspec.study.loopback import copy_rate, socket_rate
from pdspec.study.processes import Running, cpu_seconds, process
from pdspec.study.replay import PAGE_SIZE, TARGET, Unchecked, Wish, arguments
from pdspec.transfer.frames import Done, Open, Pages
from pdspec.transfer.grpc_stream import PrefillCall, relay_metadata
from pdspec.transfer.shm_stream import Offers
from pdspec.transfer.wireformat import one_view
from pdspec.types import CacheGroup, GenerateRequest
from pdspec.wire.channels import make_channel
from pdspec.wire.memory import keep_freed_memory

PATHS = ("grpc", "relay", "shm")
Progress = Callable[[str], object]


@dataclass(frozen=True)
class Taken:
    """One stream: payload bytes, wall seconds, and CPU seconds of each process."""

    bytes: int
    seconds: float
    cpu: dict[str, float]


class Receiver:
    """The decode worker's end, in this process."""

    def __init__(self, group: CacheGroup, tokens: int, sender: Running, relay: Running) -> None:
        self.group, self.tokens, self.sender, self.relay = group, tokens, sender, relay
        self.pages = list(range(pages_for(tokens, PAGE_SIZE)))
        self.cache = PagedCache((group,), len(self.pages), PAGE_SIZE)
        self.scratch = np.zeros(2 << 20, np.uint8)
        self.offers = {path: Offers("shm" if path == "shm" else "grpc") for path in PATHS}
        self._epoch = 0

    def stream(self, path: str, raw_bytes: int = 0) -> Taken:
        """One stream over ``path``: a prompt's rows, or ``raw_bytes``. Raises what the transfer raises."""
        return asyncio.run(self._stream(path, raw_bytes))

    async def _stream(self, path: str, raw_bytes: int) -> Taken:
        relayed = path == "relay"
        channel = make_channel(self.relay.address if relayed else self.sender.address)
        metadata = relay_metadata(self.sender.address) if relayed else ()
        try:
            await channel.channel_ready()
            offer = await self.offers[path].offer(self.sender.address)
            before, began = self._cpu(path), time.perf_counter()
            opening = self._opening(Wish(raw_bytes=raw_bytes), offer.text)
            async with PrefillCall(channel, opening, metadata=metadata, offer=offer) as call:
                if raw_bytes:
                    call.ledger = Unchecked(opening.epoch)
                moved = await self._take(call, path == "shm" and raw_bytes > 0)
            seconds = time.perf_counter() - began
            cpu = {name: after - before[name] for name, after in self._cpu(path).items()}
            return Taken(moved, seconds, cpu)
        finally:
            await channel.close()

    def _opening(self, wish: Wish, segment: str) -> Open:
        self._epoch += 1
        ids = (1,) * self.tokens
        request = GenerateRequest(request_id=wish.text, prompt_ids=ids)
        return Open(epoch=self._epoch, request=request, drafter="none", draft_prefill="prefill", segment=segment)

    async def _take(self, call: PrefillCall, copied: bool) -> int:
        moved = 0
        async for frame in call:
            match frame:
                case Pages(group="raw"):
                    payload = one_view(frame.payload)
                    moved += payload.nbytes
                    if copied:
                        self.scratch[: payload.nbytes] = np.frombuffer(payload, np.uint8)
                case Pages():
                    stop, payload = frame.start + frame.count, one_view(frame.payload)
                    self.cache.write_rows(frame.group, frame.layer, self.pages, frame.start, stop, payload)
                case Done() if not moved:
                    call.ledger.check(frame)
                    moved = call.ledger.moved(self.group.name)
        return moved

    def _cpu(self, path: str) -> dict[str, float]:
        found = {"prefill": self.sender.cpu_seconds(), "decode": cpu_seconds("self")}
        return found | ({"relay": self.relay.cpu_seconds()} if path == "relay" else {})


@contextmanager
def receiver(config: WorkerConfig, tokens: int) -> Iterator[Receiver]:
    """A sender, a relay, and this process as the receiver of ``config``'s KV."""
    group = resolve(config.model, config.cache_dir or None).config.cache_group(TARGET, config.dtype)
    keep_freed_memory()  # as workers do
    with process("pdspec.study.replay", *arguments(group, tokens)) as sender:
        with process("router.relay", "--port", "0") as relay:
            yield Receiver(group, tokens, sender, relay)


def measure(here: Receiver, raw_bytes: int, runs: int) -> dict[str, Any]:
    """Rates and CPU of every path, medians of ``runs`` in turns after one that warms up."""
    raw, whole = defaultdict[str, list[Taken]](list), defaultdict[str, list[Taken]](list)
    for index in range(runs + 1):
        for path in PATHS:
            taken = here.stream(path, raw_bytes), here.stream(path)
            if index:
                raw[path].append(taken[0])
                whole[path].append(taken[1])
    return {path: {"raw": _rates(raw[path]), "handoff": _rates(whole[path])} for path in PATHS}


def _rates(taken: list[Taken]) -> dict[str, Any]:
    rates = [one.bytes / one.seconds for one in taken]
    cpu = {name: statistics.mean(one.cpu[name] for one in taken) for name in taken[0].cpu}
    return {
        "bytes": taken[0].bytes, "bytes_per_second": statistics.median(rates), "runs": rates,
        "cpu_seconds": sum(cpu.values()), "cpu_seconds_of": cpu,
    }  # fmt: skip


def run(*, worker: dict[str, Any], tokens: int, megabytes: int, runs: int, progress: Progress) -> dict[str, Any]:
    """The whole benchmark. Raises ConfigError for a model that cannot be found."""
    config = WorkerConfig.from_mapping(worker)
    with receiver(config, tokens) as here:
        progress(f"{megabytes} MB raw and handoffs of {tokens} tokens, {runs} times")
        paths = measure(here, megabytes << 20, runs)
    floors = {"socket": socket_rate(), "copy": copy_rate()}
    for path, found in paths.items():
        floor = "copy" if path == "shm" else "socket"
        for kind in found.values():
            kind["floor"], kind["of_floor"] = floor, kind["bytes_per_second"] / floors[floor]
    return {"tokens": tokens, "floors_bytes_per_second": floors, "paths": paths}
