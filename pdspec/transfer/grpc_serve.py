"""The handoff over a gRPC stream of raw bytes, prefill worker's end (the other is ``grpc_stream``)."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping

import grpc
import numpy as np

from pdspec.errors import PdspecError, PeerLost, TransferDamaged
from pdspec.transfer.base import CreditWindow
from pdspec.transfer.faults import FrameFaults
from pdspec.transfer.frames import (
    DATA_FRAMES,
    FRAME_BYTES,
    Alive,
    Begin,
    Credit,
    ErrorFrame,
    Landed,
    Open,
    parse_frame,
    payload_bytes,
)
from pdspec.transfer.grpc_stream import PLACE, SERVICE
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.pace import Pace
from pdspec.transfer.schema import Frame
from pdspec.transfer.shm_serve import OWN, Lanes
from pdspec.transfer.wireformat import MAX_FRAMES, encode_frame, encode_message, frame_parts

MAX_UNASKED = 1024  # frames that a decode worker may send beyond four for each that it was sent


class PrefillStream:
    """The prefill worker's end (a PrefillSink); made by ``prefill_handler``."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        opening: Open,
        *,
        steps: Callable[[], int],
        stall_timeout_s: float,
        alive_s: float,
        lanes: Lanes,
        pace: Pace,
        faults: FrameFaults | None = None,
    ) -> None:
        self._faults = faults
        self.open, self.ledger = opening, Ledger(opening.epoch)
        self.landed_seq, self.finished = -1, False
        self._context, self._steps = context, steps
        self._stall_timeout_s, self._alive_s = stall_timeout_s, alive_s
        self._window = CreditWindow(opening.credit, stall_timeout_s=stall_timeout_s)
        self._write_lock = asyncio.Lock()
        self._written = self._heard = 0
        self._batch: list[list[bytes | memoryview]] = []  # frames of the next message
        self._batch_bytes = 0  # of their payloads
        self._pace = pace
        self._lane, self._refused = lanes.lane(opening.segment, stall_timeout_s=stall_timeout_s)

    async def send(self, frame: Frame, *, more: bool = False) -> None:
        """See PrefillSink. One caller at a time."""
        if isinstance(frame, DATA_FRAMES):
            frame = dataclasses.replace(frame, epoch=self.open.epoch, seq=self.ledger.next_seq())
            size = payload_bytes(frame)
            if self._pace.rate or not self._window.fits(size) or not (self._lane is None or self._lane.ready):
                await self.flush()  # what it waits for may be the answer to what is kept
            await self._window.take(size)
            await self._pace.take(size)
            self.ledger.add(frame)
            self._batch_bytes += size
        elif isinstance(frame, Begin):
            mover = "shm" if self._lane else "grpc"
            frame = dataclasses.replace(frame, epoch=self.open.epoch, mover=mover, refused=self._refused)
        elif frame.epoch != self.open.epoch:
            frame = dataclasses.replace(frame, epoch=self.open.epoch)  # type: ignore[type-var]
        await self._write(frame, more=more)

    async def finish(self, stats: Mapping[str, float] | None = None) -> None:
        """See PrefillSink."""
        await self._write(self.ledger.done(dict(stats or {})))
        self.finished = True

    async def listen(self) -> None:
        """Take credits until the other end closes; what is damaged makes the next ``send`` raise."""
        try:
            while (data := await self._context.read()) is not grpc.aio.EOF:
                self._heard += 1
                if self._heard > 4 * self._written + MAX_UNASKED:  # a grant follows what was sent
                    raise TransferDamaged(f"{self._heard} frames for {self._written} that were sent", field="frame")
                frame = parse_frame(data)
                if not self.ledger.admit(frame.epoch):
                    continue
                match frame:
                    case Credit():
                        self._window.give(frame.bytes)
                    case Landed():
                        self.landed_seq = max(self.landed_seq, frame.seq)
                        if self._lane:
                            self._window.give(self._lane.landed(frame.seq))
                    case _:
                        raise TransferDamaged(f"unexpected {frame.kind}", field="frame.kind")
        except PdspecError as error:
            self._window.fail(error)

    async def keep_alive(self) -> None:
        """Say Alive whenever ``alive_s`` passed without another frame."""
        while True:
            before = self._written
            await asyncio.sleep(self._alive_s)
            if self._written == before and not self._write_lock.locked():
                await self._write(Alive(epoch=self.open.epoch, steps=self._steps()))

    def close(self) -> None:
        """The stream has ended."""
        if self._lane:
            self._lane.close()

    async def flush(self) -> None:
        """See PrefillSink."""
        async with self._write_lock:
            batch, self._batch, self._batch_bytes = self._batch, [], 0
            if batch:
                await self._put(encode_message(batch))
                self._written += len(batch)

    async def _write(self, frame: Frame, *, more: bool = False) -> None:
        header, payload = frame.pack()
        place = None
        if self._lane and isinstance(frame, DATA_FRAMES):
            place = await self._lane.place(frame.seq, payload)
            if place:
                header, payload = {**header, PLACE: place}, b""
        if self._faults:
            memory = self._lane.slot(place) if self._lane and place else None
            await self._damage(self._faults, frame, encode_frame(header, payload), memory)
            return
        self._batch.append(frame_parts(header, payload))
        full = self._batch_bytes >= FRAME_BYTES * (OWN if place else 1) or len(self._batch) >= MAX_FRAMES
        if full or not more:
            await self.flush()

    async def _damage(self, faults: FrameFaults, frame: Frame, data: bytes, memory: np.ndarray | None) -> None:
        async with self._write_lock:
            for sent in faults.apply(frame, data, memory):
                await self._put(sent)
            self._written += 1

    async def _put(self, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout_s):  # wait_for of Python 3.11 may lose a cancel
                await self._context.write(message)
        except TimeoutError:
            error = f"the decode worker took nothing for {self._stall_timeout_s} s"
            raise PeerLost(error, field="stall_timeout_s") from None


def prefill_handler(
    serve: Callable[[PrefillStream], Awaitable[None]],
    *,
    steps: Callable[[], int],
    stall_timeout_s: float = 5.0,
    alive_s: float = 1.0,
    lanes: Lanes | None = None,
    pace: Pace | None = None,
    faults: FrameFaults | None = None,
) -> grpc.GenericRpcHandler:
    """For ``server.add_generic_rpc_handlers((prefill_handler(...),))``.

    ``lanes`` take offers of shared memory (none: they are refused), ``pace`` is the link's limit.

    ``serve`` sends Begin … and returns after ``finish``. A typed error it raises goes out as ErrorFrame and as the
    call's status; when the decode worker cancels, ``serve`` is cancelled. ``steps`` is read for Alive and must grow
    while the engine does anything, so count layers of a long chunk, not only whole steps. ``faults`` are for tests.
    """
    shared, link = lanes or Lanes("grpc"), pace or Pace(0)

    async def handle(_: object, context: grpc.aio.ServicerContext) -> None:
        stream = PrefillStream(
            context, await _read_open(context, stall_timeout_s), steps=steps, stall_timeout_s=stall_timeout_s,
            alive_s=alive_s, lanes=shared, pace=link, faults=faults,
        )  # fmt: skip
        listener, heart = asyncio.ensure_future(stream.listen()), asyncio.ensure_future(stream.keep_alive())
        try:
            await serve(stream)
            if stream.finished:  # stay until the other end has read Done
                await asyncio.wait({listener}, timeout=stall_timeout_s)
        except PdspecError as error:
            await stream.send(ErrorFrame.of(stream.open.epoch, error))
            await asyncio.wait({listener}, timeout=stall_timeout_s)
            raise
        finally:
            if faults:
                faults.forget(stream.open.epoch)
            for task in (listener, heart):
                task.cancel()
            stream.close()
            await asyncio.gather(listener, heart, return_exceptions=True)

    method = grpc.stream_stream_rpc_method_handler(handle)
    return grpc.method_handlers_generic_handler(SERVICE, {"Prefill": method})


async def _read_open(context: grpc.aio.ServicerContext, timeout_s: float) -> Open:
    try:
        async with asyncio.timeout(timeout_s):
            data = await context.read()
    except TimeoutError:
        raise PeerLost(f"no Open for {timeout_s} s", field="open") from None
    if data is grpc.aio.EOF:
        raise TransferDamaged("the stream ended before Open", field="open")
    frame = parse_frame(data)
    if not isinstance(frame, Open):
        raise TransferDamaged(f"{frame.kind} where Open was due", field="open")
    return frame
