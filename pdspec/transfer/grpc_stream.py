"""The handoff over a gRPC stream of raw bytes: no protobuf object is ever made for a payload.

    decode worker                                prefill worker
    PrefillCall ── Open, Credit ──────────────▶ PrefillStream     (method /pdspec.v1.PrefillWorker/Prefill)
                ◀── Begin, Pages … Done, Alive ─

``Alive`` carries the prefill worker's progress counter while there is nothing to send, so that a peer that is busy
is told from one that is stuck.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType

import grpc

from pdspec.errors import PdspecError, PeerLost, TransferDamaged
from pdspec.transfer.base import CreditWindow
from pdspec.transfer.frames import (
    Alive,
    Begin,
    Credit,
    Done,
    DraftStart,
    ErrorFrame,
    HiddenRows,
    Landed,
    Open,
    Pages,
    parse_frame,
)
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.schema import Frame
from pdspec.wire.status import from_rpc_error

log = logging.getLogger(__name__)

SERVICE = "pdspec.v1.PrefillWorker"
METHOD = f"/{SERVICE}/Prefill"
TARGET_KEY = "pdspec-target"  # call metadata that tells a relay where to go
_DATA = (Pages, HiddenRows, DraftStart)
_CREDIT_STEP = 1 << 20  # smaller grants are sent together


def relay_metadata(target: str) -> tuple[tuple[str, str], ...]:
    """Call metadata for a Prefill call through a relay to the prefill worker at ``target``."""
    return ((TARGET_KEY, target),)


class PrefillCall:
    """The decode worker's end (a PrefillSource)::

        async with PrefillCall(channel, opening, stall_timeout_s=5.0, peer=address) as call:
            async for frame in call:
                ...

    ``channel`` leads to the prefill worker, or to a relay with ``metadata=relay_metadata(address)``. Data frames are in
    ``call.ledger`` when they are yielded; Alive, ErrorFrame and frames of other epochs (counted in ``ledger.dropped``)
    are not yielded. ``auto_grant`` takes a frame for consumed when the next one is asked for; without it the caller
    grants what has landed. Leaving the block cancels the call, always.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        opening: Open,
        *,
        stall_timeout_s: float = 5.0,
        peer: str = "prefill worker",
        metadata: Sequence[tuple[str, str]] = (),
        auto_grant: bool = True,
    ) -> None:
        self.ledger = Ledger(opening.epoch)
        self._channel, self._opening, self._metadata = channel, opening, tuple(metadata)
        self._stall_timeout_s, self._peer, self._auto_grant = stall_timeout_s, peer, auto_grant
        self._write_lock = asyncio.Lock()
        self._granted = 0
        self._steps = -1

    async def __aenter__(self) -> PrefillCall:
        self._call = self._channel.stream_stream(METHOD)(metadata=self._metadata)
        try:
            await self._write(self._opening)
        except BaseException:
            self._call.cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Frame]:
        begun = False
        while True:
            frame = await self._next()
            if isinstance(frame, Begin) == begun:
                message = "a second Begin" if begun else f"{frame.kind} before Begin"
                raise TransferDamaged(message, field="frame.kind")
            begun = True
            size = 0
            if isinstance(frame, _DATA):
                self.ledger.add(frame)
                size = payload_bytes(frame)
            if isinstance(frame, Done):
                await self._close()
            yield frame
            if isinstance(frame, Done):
                return
            if size and self._auto_grant:
                await self.grant(size)

    async def grant(self, consumed: int) -> None:
        """``consumed`` payload bytes have landed. Small grants are sent together."""
        self._granted += consumed
        if self._granted >= min(_CREDIT_STEP, self._opening.credit // 8):
            await self._flush_credit()

    async def landed(self, seq: int) -> None:
        """Everything up to ``seq`` is out of the peer's memory."""
        await self._write(Landed(epoch=self.ledger.epoch, seq=seq))

    async def _next(self) -> Frame:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._stall_timeout_s
        while True:
            frame = await self._read(deadline - loop.time())
            if not self.ledger.admit(frame.epoch):
                continue  # another reservation's: no progress of ours
            if isinstance(frame, ErrorFrame):
                raise frame.to_error()
            if not isinstance(frame, Alive):
                return frame
            if frame.steps != self._steps:
                self._steps = frame.steps
                deadline = loop.time() + self._stall_timeout_s
            await self._flush_credit()  # a quiet sender may be waiting for the last small grant

    async def _read(self, timeout_s: float) -> Frame:
        try:
            data = await asyncio.wait_for(self._call.read(), max(0.0, timeout_s))
        except TimeoutError:
            message = f"{self._peer} made no progress for {self._stall_timeout_s} s"
            raise PeerLost(message, field="stall_timeout_s") from None
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self._peer) from error
        if data is grpc.aio.EOF:
            raise await self._end_error()
        return parse_frame(data)

    async def _end_error(self) -> PdspecError:
        """Why the stream ended before Done."""
        if await self._call.code() is grpc.StatusCode.OK:
            return PeerLost(f"{self._peer} ended the stream before Done")
        trailing = tuple(await self._call.trailing_metadata())
        failed = grpc.aio.AioRpcError(
            await self._call.code(), await self._call.initial_metadata(), trailing, await self._call.details()
        )
        return from_rpc_error(failed, peer=self._peer)

    async def _flush_credit(self) -> None:
        granted, self._granted = self._granted, 0
        if granted:
            await self._write(Credit(epoch=self.ledger.epoch, bytes=granted))

    async def _close(self) -> None:
        """Half-close: the prefill worker keeps the call open until then, because a Credit that crosses the call's end
        would fail, and gRPC would then hide Done behind an INTERNAL status."""
        async with self._write_lock:
            try:
                await self._call.done_writing()
            except (grpc.RpcError, asyncio.InvalidStateError):
                log.debug("%s is gone after Done", self._peer)

    async def _write(self, frame: Frame) -> None:
        async with self._write_lock:
            try:
                await self._call.write(frame.to_bytes())
            except (grpc.RpcError, asyncio.InvalidStateError):
                log.debug("%s is gone; reading says why", self._peer)


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
    ) -> None:
        self.open, self.ledger = opening, Ledger(opening.epoch)
        self.landed_seq, self.finished = -1, False
        self._context, self._steps = context, steps
        self._stall_timeout_s, self._alive_s = stall_timeout_s, alive_s
        self._window = CreditWindow(opening.credit, stall_timeout_s=stall_timeout_s)
        self._write_lock = asyncio.Lock()
        self._written = 0

    async def send(self, frame: Frame) -> None:
        """See PrefillSink. One caller at a time."""
        if isinstance(frame, _DATA):
            frame = dataclasses.replace(frame, epoch=self.open.epoch, seq=self.ledger.next_seq())
            await self._window.take(payload_bytes(frame))
            self.ledger.add(frame)
        elif frame.epoch != self.open.epoch:
            frame = dataclasses.replace(frame, epoch=self.open.epoch)  # type: ignore[type-var]
        await self._write(frame)

    async def finish(self, stats: Mapping[str, float] | None = None) -> None:
        """See PrefillSink."""
        await self._write(self.ledger.done(dict(stats or {})))
        self.finished = True

    async def listen(self) -> None:
        """Take credits until the other end closes; what is damaged makes the next ``send`` raise."""
        try:
            while (data := await self._context.read()) is not grpc.aio.EOF:
                frame = parse_frame(data)
                if not self.ledger.admit(frame.epoch):
                    continue
                match frame:
                    case Credit():
                        self._window.give(frame.bytes)
                    case Landed():
                        self.landed_seq = max(self.landed_seq, frame.seq)
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

    async def _write(self, frame: Frame) -> None:
        async with self._write_lock:
            try:
                await asyncio.wait_for(self._context.write(frame.to_bytes()), self._stall_timeout_s)
            except TimeoutError:
                message = f"the decode worker took nothing for {self._stall_timeout_s} s"
                raise PeerLost(message, field="stall_timeout_s") from None
            self._written += 1


def prefill_handler(
    serve: Callable[[PrefillStream], Awaitable[None]],
    *,
    steps: Callable[[], int],
    stall_timeout_s: float = 5.0,
    alive_s: float = 1.0,
) -> grpc.GenericRpcHandler:
    """For ``server.add_generic_rpc_handlers((prefill_handler(...),))``.

    ``serve`` sends Begin … and returns after ``finish``. A typed error it raises goes out as ErrorFrame and as the
    call's status; when the decode worker cancels, ``serve`` is cancelled. ``steps`` is read for Alive and must grow
    while the engine does anything, so count layers of a long chunk, not only whole steps.
    """

    async def handle(_: object, context: grpc.aio.ServicerContext) -> None:
        opening = await _read_open(context, stall_timeout_s)
        stream = PrefillStream(context, opening, steps=steps, stall_timeout_s=stall_timeout_s, alive_s=alive_s)
        listener, heart = asyncio.ensure_future(stream.listen()), asyncio.ensure_future(stream.keep_alive())
        try:
            await serve(stream)
            if stream.finished:  # stay until the other end has read Done
                await asyncio.wait({listener}, timeout=stall_timeout_s)
        except PdspecError as error:
            await stream.send(ErrorFrame.of(opening.epoch, error))
            await asyncio.wait({listener}, timeout=stall_timeout_s)
            raise
        finally:
            for task in (listener, heart):
                task.cancel()
            await asyncio.gather(listener, heart, return_exceptions=True)

    method = grpc.stream_stream_rpc_method_handler(handle)
    return grpc.method_handlers_generic_handler(SERVICE, {"Prefill": method})


def payload_bytes(frame: Frame) -> int:
    """What ``frame`` counts against the credit window."""
    match frame:
        case Pages() | HiddenRows():
            return memoryview(frame.payload).nbytes
        case DraftStart():
            return sum(row.nbytes for row in frame.rows.values())
    return 0


async def _read_open(context: grpc.aio.ServicerContext, timeout_s: float) -> Open:
    try:
        data = await asyncio.wait_for(context.read(), timeout_s)
    except TimeoutError:
        raise PeerLost(f"no Open for {timeout_s} s", field="open") from None
    if data is grpc.aio.EOF:
        raise TransferDamaged("the stream ended before Open", field="open")
    frame = parse_frame(data)
    if not isinstance(frame, Open):
        raise TransferDamaged(f"{frame.kind} where Open was due", field="open")
    return frame
