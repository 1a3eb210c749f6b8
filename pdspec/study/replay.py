"""``python -m pdspec.study.replay``: a prefill worker that computes nothing.

It answers ``Prefill`` with rows that it made up, layer by layer, frame by frame and in a prefill's rhythm, through the
prefill worker's own code. So a benchmark sees what a handoff costs without the prefill beside it. What a request wants
stands in its id (``Wish``).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.engine.serving import Served
from pdspec.transfer.frames import Begin, First, Pages
from pdspec.transfer.grpc_serve import PrefillStream, prefill_handler
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.shm_serve import Lanes
from pdspec.types import CacheGroup
from pdspec.wire.channels import bind, make_server
from pdspec.wire.serving import run_in_foreground
from prefill_worker.service import page_frames

TARGET = "target"
PAGE_SIZE, CHUNK = 16, 512
TOKEN = 5  # t_n of every answer
RAW_BYTES = 64 << 20  # what raw streams are read from: more than the caches of a core hold


class Unchecked(Ledger):
    """Counts without hashing: what a stream costs when nobody vouches for it."""

    def _count(self, group: str, place: tuple[int, ...], rows: int, payload: Any) -> None:
        self._counts[group].rows += rows


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Of one stream, as ``GenerateRequest.request_id``."""

    seconds: float = 0.0  # of the prefill that is played; 0: as fast as it goes
    raw_bytes: int = 0  # instead of a prompt's rows: so many bytes in frames of 2 MiB, without checksums

    @property
    def text(self) -> str:
        """The id."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Wish:
        """What ``text`` says."""
        return cls(**json.loads(text))


class Replay:
    """Rows of ``group`` for prompts of up to ``max_tokens``."""

    def __init__(self, group: CacheGroup, max_tokens: int) -> None:
        self.group = group
        self.pages = list(range(pages_for(max_tokens, PAGE_SIZE)))
        self.cache = PagedCache((group,), len(self.pages), PAGE_SIZE)
        self.cache.group(group.name).normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        self.raw = memoryview(bytes(RAW_BYTES))

    async def serve(self, stream: PrefillStream) -> None:
        """One stream."""
        wish = Wish.of(stream.open.request.request_id)
        if wish.raw_bytes:
            await self._raw(stream, wish.raw_bytes)
            return
        rows = len(stream.open.request.prompt_ids)
        await stream.send(Begin(epoch=0, rows={self.group.name: rows}, worker_id="replay"))
        await self._rows(stream, rows, wish.seconds)
        await stream.send(First(epoch=0, token_id=TOKEN))
        await stream.finish()

    async def _rows(self, stream: PrefillStream, rows: int, seconds: float) -> None:
        clock, layers = asyncio.get_running_loop().time, self.group.num_layers
        began, steps = clock(), layers * -(-rows // CHUNK)
        for step in range(steps):
            chunk, layer = divmod(step, layers)
            if seconds:
                await asyncio.sleep(max(0.0, began + seconds * (step + 1) / steps - clock()))
            start, stop = chunk * CHUNK, min(rows, (chunk + 1) * CHUNK)
            for frame in page_frames(self.cache, self.pages, self.group.name, layer, start, stop, have={}):
                await stream.send(frame, more=True)
            if seconds:
                await stream.flush()

    async def _raw(self, stream: PrefillStream, count: int) -> None:
        stream.ledger = Unchecked(stream.open.epoch)
        await stream.send(Begin(epoch=0, rows={}))
        size = 2 << 20
        for number in range(-(-count // size)):
            at = number * size % RAW_BYTES
            await stream.send(Pages(
                epoch=0, seq=0, group="raw", layer=0, start=number, count=1, head_start=0, head_count=1,
                payload=self.raw[at : at + size],
            ), more=True)  # fmt: skip
        await stream.finish()


@asynccontextmanager
async def serving(group: CacheGroup, max_tokens: int) -> AsyncIterator[Served]:
    """Serve on a free port of this machine."""
    server, replay = make_server(), Replay(group, max_tokens)
    server.add_generic_rpc_handlers((prefill_handler(replay.serve, steps=lambda: 0, lanes=Lanes("auto")),))
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield Served(address)
    finally:
        await server.stop(0)


def arguments(group: CacheGroup, max_tokens: int) -> tuple[str, ...]:
    """The command line of a replay."""
    return ("--group", json.dumps(dataclasses.asdict(group)), "--max-tokens", str(max_tokens))


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pdspec.study.replay", description=__doc__)
    parser.add_argument("--group", required=True, help="JSON of a cache group")
    parser.add_argument("--max-tokens", type=int, required=True)
    given = parser.parse_args(argv)
    return run_in_foreground(lambda: serving(CacheGroup(**json.loads(given.group)), given.max_tokens), "replay")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
