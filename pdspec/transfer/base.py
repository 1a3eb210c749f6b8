"""The two ends of a handoff, whatever moves the bytes: one small file per mover implements both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from pdspec.errors import PeerLost
from pdspec.transfer.frames import Open
from pdspec.transfer.ledger import Ledger
from pdspec.transfer.schema import Frame


class PrefillSink(Protocol):
    """The prefill worker's end of one stream. ``open`` is what the decode worker asked for."""

    open: Open
    ledger: Ledger

    async def send(self, frame: Frame, *, more: bool = False) -> None:
        """Send in order; waits for credit. Stamps ``epoch``, and ``seq`` on data frames. With ``more`` to come at once
        it may be kept to share a message with what follows, until ``flush``; what it shows must stand till then. Raises
        PeerLost when the other end takes nothing for ``stall_timeout_s``."""

    async def flush(self) -> None:
        """Send what was kept."""

    async def finish(self, stats: Mapping[str, float] | None = None) -> None:
        """Send Done, made from the ledger."""


class PrefillSource(Protocol):
    """The decode worker's end: iterate over the frames, Begin first, Done last; data is in ``ledger`` already."""

    ledger: Ledger

    def __aiter__(self) -> AsyncIterator[Frame]:
        """Raises PeerLost on a lost, stalled or cut stream, TransferDamaged, or the error that the prefill worker
        sent."""

    async def grant(self, consumed: int) -> None:
        """``consumed`` payload bytes have landed: as many may come again."""


class CreditWindow:
    """Payload bytes that may be under way: ``take`` waits until there is room, ``give`` makes some.

    A frame larger than the whole window passes when nothing else is under way.
    """

    def __init__(self, size: int, *, stall_timeout_s: float) -> None:
        self.size, self.in_flight = size, 0
        self._stall_timeout_s = stall_timeout_s
        self._room = asyncio.Event()
        self._failure: Exception | None = None

    def fits(self, count: int) -> bool:
        """Whether ``take`` would not wait."""
        return not self.in_flight or self.in_flight + count <= self.size

    async def take(self, count: int) -> None:
        """Raises PeerLost when no credit comes for ``stall_timeout_s``, or what ``fail`` was given."""
        while self._failure is None and not self.fits(count):
            self._room.clear()
            try:
                async with asyncio.timeout(self._stall_timeout_s):  # wait_for of Python 3.11 may lose a cancel
                    await self._room.wait()
            except TimeoutError:
                message = f"no credit for {self._stall_timeout_s} s with {self.in_flight} bytes under way"
                raise PeerLost(message, field="stall_timeout_s") from None
        if self._failure is not None:
            raise self._failure
        self.in_flight += count

    def give(self, count: int) -> None:
        """``count`` bytes were consumed."""
        self.in_flight = max(0, self.in_flight - count)
        self._room.set()

    def fail(self, error: Exception) -> None:
        """Every ``take`` from now on raises ``error``."""
        self._failure = error
        self._room.set()
