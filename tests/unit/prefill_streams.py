"""A Prefill stream with one end served by a function, for tests of movers and of peers that misbehave."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc

from pdspec.transfer import frames
from pdspec.transfer.grpc_serve import PrefillStream, prefill_handler
from pdspec.transfer.grpc_stream import PrefillCall
from pdspec.transfer.segment import Segment
from pdspec.transfer.shm_serve import Lanes
from pdspec.transfer.shm_stream import Offers
from pdspec.types import GenerateRequest
from pdspec.wire.channels import bind, make_channel, make_server

OPEN = frames.Open(
    epoch=7, request=GenerateRequest(request_id="r", prompt_ids=(1, 2)), drafter="none", draft_prefill=""
)
Serve = Callable[[PrefillStream], Awaitable[None]]
SMALL = partial(Segment.create, slots=4, slot_bytes=2000)


@asynccontextmanager
async def serving(serve: Serve, **options: Any) -> AsyncIterator[grpc.aio.Channel]:
    server = make_server()
    handler = prefill_handler(serve, **{"steps": lambda: 0, "lanes": Lanes("auto"), **options})
    server.add_generic_rpc_handlers((handler,))
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    channel = make_channel(address)
    try:
        yield channel
    finally:
        await channel.close()
        await server.stop(0)


def pages(count: int, start: int = 0, row: int = 1000) -> frames.Pages:
    payload = bytes([start % 256]) * (row * count)
    return frames.Pages(
        epoch=0, seq=0, group="target", layer=0, start=start, count=count, head_start=0, head_count=1, payload=payload
    )


def begin() -> frames.Begin:
    return frames.Begin(epoch=0, rows={"target": 2})


async def collect(
    channel: grpc.aio.Channel, mover: str, opening: frames.Open = OPEN, **options: Any
) -> tuple[list, PrefillCall]:
    """Payloads are copied, as a decode worker does: what a slot holds is good until the next frame."""
    offers, got = Offers(mover, SMALL), []
    offer = await offers.offer("p")
    opening = dataclasses.replace(opening, segment=offer.text)
    async with PrefillCall(channel, opening, offer=offer, **options) as call:
        async for frame in call:
            if isinstance(frame, frames.Pages):
                frame = dataclasses.replace(frame, payload=bytes(frame.payload))
            got.append(frame)
            if frame.kind == "begin":
                assert frame.mover == mover and not (offer.segment and offer.segment.path.exists())
    assert offers.counts[f"handoffs_{mover}"] == 1 and offers.counts["mover_fallbacks"] == 0
    return got, call
