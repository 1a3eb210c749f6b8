"""A prefill worker's evil twin: it passes a real worker's stream on, and changes what a test tells it to."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np

from pdspec.transfer.frames import DATA_FRAMES, Done, Open, Pages, parse_frame, parse_message
from pdspec.transfer.grpc_stream import METHOD, SERVICE
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.schema import Frame
from pdspec.wire.channels import bind, make_channel, make_server

Edit = Callable[[Frame], Iterable[Frame | bytes]]  # what goes out instead; made anew for every stream


@asynccontextmanager
async def serve_stream(handle: Callable[[Any], Any]) -> AsyncIterator[str]:
    """A Prefill method that is ``handle(context)``; yields its address."""

    async def method(_: object, context: grpc.aio.ServicerContext) -> None:
        await handle(context)

    server = make_server()
    handlers = {"Prefill": grpc.stream_stream_rpc_method_handler(method)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


@asynccontextmanager
async def tampered(target: str, make_edit: Callable[[], Edit], *, sign: bool) -> AsyncIterator[str]:
    """Stands before the prefill worker at ``target``. ``sign``: sequence numbers and Done are made to fit what goes
    out, so that only its meaning is wrong."""
    channel = make_channel(target)

    async def handle(context: grpc.aio.ServicerContext) -> None:
        call = channel.stream_stream(METHOD)()
        forward = asyncio.ensure_future(_forward(context, call))
        edit, ledger = make_edit(), None
        try:
            while (data := await call.read()) is not grpc.aio.EOF:
                for frame in (changed for came in parse_message(data) for changed in edit(came)):
                    if isinstance(frame, bytes):
                        await context.write(frame)
                        continue
                    ledger = ledger or Ledger(frame.epoch)  # type: ignore[attr-defined]
                    await context.write((_signed(frame, ledger) if sign else frame).to_bytes())
        finally:
            forward.cancel()
            call.cancel()
            await asyncio.gather(forward, return_exceptions=True)

    async with serve_stream(handle) as address:
        yield address
    await channel.close()


def _signed(frame: Frame, ledger: Ledger) -> Frame:
    if isinstance(frame, DATA_FRAMES):
        frame = replace(frame, seq=ledger.next_seq())
        fresh = Ledger(ledger.epoch)  # only to see whether this frame could be counted at all
        fresh._next_seq = frame.seq
        fresh.add(frame)
        ledger._covered.clear()  # the sender's book accepts any order of rows
        ledger.add(frame)
    return ledger.done(dict(frame.stats)) if isinstance(frame, Done) else frame


async def _forward(context: grpc.aio.ServicerContext, call: grpc.aio.StreamStreamCall) -> None:
    while (data := await context.read()) is not grpc.aio.EOF:
        frame = parse_frame(data)  # what is shared between the two ends cannot be changed on the way
        await call.write((replace(frame, segment="") if isinstance(frame, Open) else frame).to_bytes())
    await call.done_writing()


# --- edits: functions of a frame; each is made anew for every stream -------------------------------------------------


def once(wanted: Callable[[Frame], bool], change: Callable[[Frame], list[Frame | bytes]], skip: int = 1) -> Edit:
    """Change the frame number ``skip`` (from 0) that is ``wanted``."""
    count = itertools.count()

    def edit(frame: Frame) -> list[Frame | bytes]:
        return change(frame) if wanted(frame) and next(count) == skip else [frame]

    return edit


def is_group(group: str) -> Callable[[Frame], bool]:
    return lambda frame: isinstance(frame, Pages) and frame.group == group


TARGET, DRAFT = is_group("target"), is_group("draft/eagle3")


def is_kind(kind: type[Frame]) -> Callable[[Frame], bool]:
    return lambda frame: isinstance(frame, kind)


def with_(**changes: object) -> Callable[[Frame], list[Frame | bytes]]:
    return lambda frame: [dataclasses.replace(frame, **changes)]  # type: ignore[type-var]


def flip(frame: Frame) -> list[Frame | bytes]:
    payload = bytearray(frame.payload)  # type: ignore[attr-defined]
    payload[len(payload) // 2] ^= 1
    return [dataclasses.replace(frame, payload=bytes(payload))]  # type: ignore[type-var]


def cut(frame: Frame) -> list[Frame | bytes]:
    return [dataclasses.replace(frame, payload=bytes(frame.payload)[:-1])]  # type: ignore[type-var, attr-defined]


def drop(frame: Frame) -> list[Frame | bytes]:
    return []


def twice(frame: Frame) -> list[Frame | bytes]:
    return [frame, frame]


def swap() -> Edit:
    """The second and third target frames change places."""
    held: list[Frame] = []
    count = itertools.count()

    def edit(frame: Frame) -> list[Frame | bytes]:
        if TARGET(frame):
            number = next(count)
            if number == 1:
                held.append(frame)
                return []
            if number == 2:
                return [frame, held.pop()]
        return [frame]

    return edit


def next_layer(frame: Frame) -> list[Frame | bytes]:
    return [dataclasses.replace(frame, layer=frame.layer + 1)]  # type: ignore[type-var, attr-defined]


def next_row(frame: Frame) -> list[Frame | bytes]:
    return [dataclasses.replace(frame, start=frame.start + 1)]  # type: ignore[type-var, attr-defined]


def other_rows(frame: Frame) -> list[Frame | bytes]:
    return [dataclasses.replace(frame, rows={**frame.rows, "target": 44})]  # type: ignore[type-var, attr-defined]


def other_hash(frame: Frame) -> list[Frame | bytes]:
    hashes = {**frame.xxh3, "target": frame.xxh3["target"] ^ 1}  # type: ignore[attr-defined]
    return [dataclasses.replace(frame, xxh3=hashes)]  # type: ignore[type-var]


def half_heads(frame: Frame) -> list[Frame | bytes]:
    rows = np.frombuffer(frame.payload, np.uint8).reshape(frame.count, 2, 2, -1)  # type: ignore[attr-defined]
    half = np.ascontiguousarray(rows[:, :, :1]).tobytes()
    return [dataclasses.replace(frame, head_count=1, payload=half)]  # type: ignore[type-var]


def alien_ids(frame: Frame) -> list[Frame | bytes]:
    ids = frame.token_ids.copy()  # type: ignore[attr-defined]
    ids[0] = 10**6
    return [dataclasses.replace(frame, token_ids=ids)]  # type: ignore[type-var]
