"""The shared-memory mover, prefill worker's end (the other is ``shm_stream``): payloads are written into slots of the
decode worker's segment, frames name their places.

    Lanes ── one per worker ──▶ Slots ── one per segment ──▶ Lane ── one per stream
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

import numpy as np

from pdspec.errors import PeerLost
from pdspec.transfer.segment import Segment
from pdspec.transfer.wireformat import Payload, byte_views

log = logging.getLogger(__name__)
OWN = 4  # a stream waits for slots only while it holds so many of them: the other end frees as many at once


class Slots:
    """The free slots of one segment; the one used last is used first, while the caches still hold it."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._free = list(range(segment.slots))
        self._freed = asyncio.Event()

    @property
    def free(self) -> int:
        """How many."""
        return len(self._free)

    def take(self) -> int:
        """A free slot. Raises IndexError when there is none."""
        return self._free.pop()

    def give(self, index: int) -> None:
        """Nobody reads it any more."""
        self._free.append(index)
        self._freed.set()

    async def wait(self) -> None:
        """Until one is given back."""
        self._freed.clear()
        await self._freed.wait()


class Lane:
    """One stream's slots. Nothing that another stream of the same decode worker does can hold it up: without slots of
    its own to wait for, its payloads go into the frames."""

    def __init__(self, slots: Slots, *, stall_timeout_s: float) -> None:
        self._slots, self._stall_timeout_s = slots, stall_timeout_s
        self._held: deque[tuple[int, int, int]] = deque()  # seq, slot, payload bytes

    @property
    def ready(self) -> bool:
        """Whether ``place`` would not wait."""
        return self._slots.free > 0 or len(self._held) < OWN

    def slot(self, place: list[int]) -> np.ndarray:
        """The memory of a ``place``, uint8 [length]."""
        offset, length = place
        return self._slots.segment.slot(offset // self._slots.segment.slot_bytes)[:length]

    async def place(self, seq: int, payload: Payload) -> list[int] | None:
        """Write a payload into a slot and return its place; None where it must go into the frame. Raises PeerLost when
        the decode worker frees none for ``stall_timeout_s``."""
        parts = byte_views(payload)
        size = sum(part.nbytes for part in parts)
        if not 0 < size <= self._slots.segment.slot_bytes or not await self._room():
            return None
        index = self._slots.take()
        self._held.append((seq, index, size))
        slot, at = self._slots.segment.slot(index), 0
        for part in parts:
            slot[at : at + part.nbytes] = np.frombuffer(part, np.uint8)  # lets go of the GIL
            at += part.nbytes
        return self._slots.segment.place(index, size)

    def landed(self, seq: int) -> int:
        """Everything up to ``seq`` is out of its slot. Returns its payload bytes."""
        size = 0
        while self._held and self._held[0][0] <= seq:
            _, index, count = self._held.popleft()
            self._slots.give(index)
            size += count
        return size

    def close(self) -> None:
        """The stream has ended: whatever was under way is nobody's any more."""
        while self._held:
            self._slots.give(self._held.popleft()[1])

    async def _room(self) -> bool:
        try:
            async with asyncio.timeout(self._stall_timeout_s):  # wait_for of Python 3.11 may lose a cancel
                while not self._slots.free:
                    if len(self._held) < OWN:
                        return False
                    await self._slots.wait()
        except TimeoutError:
            message = f"no slot of {self._slots.segment.slots} came free for {self._stall_timeout_s} s"
            raise PeerLost(message, field="stall_timeout_s") from None
        return True


class Lanes:
    """The segments that this prefill worker has mapped. ``counts`` are metrics."""

    def __init__(self, mover: str) -> None:
        self.mover = mover
        self.counts = {"handoffs_shm": 0.0, "handoffs_grpc": 0.0}
        self._mapped: dict[str, Slots] = {}

    def lane(self, offer: str, *, stall_timeout_s: float) -> tuple[Lane | None, str]:
        """A lane in the offered segment, or None and why not; an empty offer asks for none."""
        self._forget()
        slots, reason = self._slots(offer) if offer else (None, "")
        self.counts["handoffs_shm" if slots else "handoffs_grpc"] += 1
        return (Lane(slots, stall_timeout_s=stall_timeout_s) if slots else None), reason

    def _slots(self, offer: str) -> tuple[Slots | None, str]:
        if self.mover == "grpc":
            return None, "the prefill worker's mover is grpc"
        if offer not in self._mapped:
            try:
                self._mapped[offer] = Slots(Segment.attach(offer))
            except (OSError, ValueError) as error:
                return None, f"the prefill worker cannot map the decode worker's memory: {error}"
        return self._mapped[offer], ""

    def _forget(self) -> None:
        """Give up the segments of decode workers that have gone."""
        for offer, slots in list(self._mapped.items()):
            if not slots.segment.creator_lives():
                slots.segment.close()
                del self._mapped[offer]
