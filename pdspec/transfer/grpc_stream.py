"""The handoff over a gRPC stream of raw bytes, decode worker's end (the other is ``grpc_serve``).

No protobuf object is ever made for a payload::

    decode worker                                prefill worker
    PrefillCall ── Open, Credit ──────────────▶ PrefillStream     (method /pdspec.v1.PrefillWorker/Prefill)
                ◀── Begin, Pages … Done, Alive ─

``Alive`` carries the prefill worker's progress counter while there is nothing to send, so that a peer that is busy
is told from one that is stuck.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from pdspec.errors import PdspecError, PeerLost, TransferDamaged
from pdspec.transfer.frames import (
    DATA_FRAMES,
    Alive,
    Begin,
    Credit,
    Done,
    DraftStart,
    ErrorFrame,
    First,
    Landed,
    Open,
    payload_bytes,
)
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.schema import Frame
from pdspec.transfer.shm_stream import Offer
from pdspec.transfer.wireformat import decode_message
from pdspec.wire.status import from_peer_error

log = logging.getLogger(__name__)

SERVICE = "pdspec.v1.PrefillWorker"
METHOD = f"/{SERVICE}/Prefill"
TARGET_KEY = "pdspec-target"  # call metadata that tells a relay where to go
PLACE = "shm"  # header key: [offset, length] of a payload that is in shared memory, not in the frame
TOTAL_TIMEOUT_S = 600.0  # for a whole handoff, however busy the peer says it is
_ONCE = (Begin, First, DraftStart)
_CREDIT_STEP = 1 << 20  # smaller grants are sent together
_LANDED_STEP = 4  # slots given back together; a sender waits only while it holds so many (``shm_serve.OWN``)


def relay_metadata(target: str) -> tuple[tuple[str, str], ...]:
    """Call metadata for a Prefill call through a relay to the prefill worker at ``target``."""
    return ((TARGET_KEY, target),)


class PrefillCall:
    """The decode worker's end (a PrefillSource)::

        async with PrefillCall(channel, opening, stall_timeout_s=5.0, peer=address) as call:
            async for frame in call:
                ...

    ``channel`` leads to the prefill worker, or to a relay with ``metadata=relay_metadata(address)``. ``offer`` is the
    shared memory that ``opening.segment`` names. A data frame's payload is good until the next frame is asked for; then
    it goes into ``call.ledger``. Alive, ErrorFrame and frames of other epochs (counted in ``ledger.dropped``) are not
    yielded. ``auto_grant`` takes a frame for consumed when the next one is asked for; without it the caller grants what
    has landed. Leaving the block cancels the call, always.
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
        total_timeout_s: float = TOTAL_TIMEOUT_S,
        offer: Offer | None = None,
    ) -> None:
        self.ledger = Ledger(opening.epoch)
        self._channel, self._opening, self._metadata = channel, opening, tuple(metadata)
        self._stall_timeout_s, self._peer, self._auto_grant = stall_timeout_s, peer, auto_grant
        self._write_lock = asyncio.Lock()
        self._granted = self._unsaid = self._unsaid_bytes = 0
        self._last_landed = self._steps = -1
        self._offer, self._placed = offer, False
        self._came: deque[tuple[dict, memoryview]] = deque()  # frames of the last message that are still to be read
        self._total_timeout_s, self._seen = total_timeout_s, set[type[Frame]]()

    async def __aenter__(self) -> PrefillCall:
        self._ends = asyncio.get_running_loop().time() + self._total_timeout_s
        self._call = self._channel.stream_stream(METHOD)(metadata=self._metadata)
        try:
            await self._write(self._opening)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()
        if self._offer:
            self._offer.ended(lost=isinstance(error, PeerLost))

    async def __aiter__(self) -> AsyncIterator[Frame]:
        while True:
            frame = await self._next()
            if not isinstance(frame, Begin) and Begin not in self._seen:
                raise TransferDamaged(f"{frame.kind} before Begin", field="frame.kind")
            if isinstance(frame, _ONCE):
                if type(frame) in self._seen:
                    raise TransferDamaged(f"a second {type(frame).__name__}", field="frame.kind")
                self._seen.add(type(frame))
            if isinstance(frame, Begin) and self._offer:
                self._offer.begun(frame)
            if isinstance(frame, DATA_FRAMES):
                self.ledger.expect(frame)
                placed = self._placed
                yield frame
                self.ledger.count(frame)
                if self._auto_grant:
                    size = payload_bytes(frame)
                    await (self._land(frame.seq, size) if placed else self.grant(size))
                continue
            if isinstance(frame, Done):
                await self._close()
            yield frame
            if isinstance(frame, Done):
                return

    async def grant(self, consumed: int) -> None:
        """``consumed`` payload bytes have landed. Small grants are sent together."""
        self._granted += consumed
        if self._granted >= min(_CREDIT_STEP, self._opening.credit // 8):
            await self._flush_credit()

    async def landed(self, seq: int) -> None:
        """Everything up to ``seq`` is out of the shared memory."""
        self._unsaid = self._unsaid_bytes = 0
        await self._write(Landed(epoch=self.ledger.epoch, seq=seq))

    async def _land(self, seq: int, size: int) -> None:
        self._unsaid, self._unsaid_bytes, self._last_landed = self._unsaid + 1, self._unsaid_bytes + size, seq
        if self._unsaid >= _LANDED_STEP or self._unsaid_bytes >= self._opening.credit // 4:
            await self.landed(seq)

    async def _next(self) -> Frame:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._stall_timeout_s
        while True:
            if loop.time() > self._ends:
                message = f"{self._peer} is not done after {self._total_timeout_s:g} s"
                raise PeerLost(message, field="handoff_timeout_s")
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
        if self._came:
            return self._parse(*self._came.popleft())
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):  # wait_for of Python 3.11 may lose a cancel
                data = await self._call.read()
        except TimeoutError:
            message = f"{self._peer} made no progress for {self._stall_timeout_s} s"
            raise PeerLost(message, field="stall_timeout_s") from None
        except grpc.RpcError as error:
            raise from_peer_error(error, peer=self._peer) from error
        if data is grpc.aio.EOF:
            raise await self._end_error()
        self._came.extend(decode_message(data))
        return self._parse(*self._came.popleft())

    def _parse(self, header: dict, payload: memoryview) -> Frame:
        self._placed = PLACE in header
        if self._placed:
            payload = self._view(header.pop(PLACE), payload)
        return Frame.parse(header, payload)

    def _view(self, place: Any, payload: memoryview) -> memoryview:
        if len(payload) or self._offer is None:
            raise TransferDamaged("a place in shared memory where none is due", field="frame.shm")
        return self._offer.view(place)

    async def _end_error(self) -> PdspecError:
        """Why the stream ended before Done."""
        if await self._call.code() is grpc.StatusCode.OK:
            return PeerLost(f"{self._peer} ended the stream before Done")
        trailing = tuple(await self._call.trailing_metadata())
        failed = grpc.aio.AioRpcError(
            await self._call.code(), await self._call.initial_metadata(), trailing, await self._call.details()
        )
        return from_peer_error(failed, peer=self._peer)

    async def _flush_credit(self) -> None:
        if self._unsaid:
            await self.landed(self._last_landed)
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
