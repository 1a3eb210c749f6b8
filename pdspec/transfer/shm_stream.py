"""The shared-memory mover, decode worker's end (the other is ``shm_serve``): one segment per prefill worker, created
when the first request goes there, offered with every ``Open``, kept for as long as both live.

An offer that is refused, because the two are not on one host or not in one ``/dev/shm``, is made to that prefill worker
no more: its handoffs go over gRPC, which is said once and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from pdspec.errors import Incompatible, PeerLost, TransferDamaged
from pdspec.transfer.frames import Begin
from pdspec.transfer.segment import Segment

log = logging.getLogger(__name__)


class Offers:
    """The segments of this decode worker by prefill worker. ``counts`` are metrics."""

    def __init__(self, mover: str, create: Callable[[], Segment] = Segment.create) -> None:
        self.mover, self._create = mover, create
        self.counts = {"handoffs_shm": 0.0, "handoffs_grpc": 0.0, "mover_fallbacks": 0.0}
        self._segments: dict[str, Segment] = {}
        self._foreign: set[str] = set()
        self._creating = asyncio.Lock()

    async def offer(self, peer: str) -> Offer:
        """What to say in ``Open`` to the prefill worker at ``peer``. Raises Incompatible where ``mover`` is shm and
        there is no memory to share."""
        if self.mover == "grpc" or peer in self._foreign:
            self.counts["mover_fallbacks"] += peer in self._foreign
            return Offer(self, peer, None)
        async with self._creating:
            if peer not in self._segments:
                try:
                    self._segments[peer] = await asyncio.to_thread(self._create)
                except OSError as error:
                    self._fall_back(peer, f"no shared memory: {error}")
                    return Offer(self, peer, None)
            return Offer(self, peer, self._segments[peer])

    def through_relay(self) -> Offer:
        """A relay passes frames alone: nothing is offered."""
        return Offer(self, "", None)

    def settle(self, offer: Offer, begin: Begin | None) -> None:
        """What the prefill worker made of an offer; None: its stream ended before it said so."""
        peer, segment = offer.peer, offer.segment
        if begin is not None:
            self.counts["handoffs_shm" if begin.mover == "shm" else "handoffs_grpc"] += 1
        if segment is None or (begin is None and segment.shared):
            return
        if begin is not None and begin.mover == "shm":
            segment.unlink()
            segment.shared = True
            return
        known = segment.shared or self._segments.get(peer) is not segment
        self._drop(peer, segment)
        if begin is not None:
            self._fall_back(peer, begin.refused or "it does not say why", for_good=not known)

    def lost(self, offer: Offer) -> None:
        """Its prefill worker has gone: give its segment up. Streams that still use it keep the memory."""
        if offer.segment is not None:
            self._drop(offer.peer, offer.segment)

    def close(self) -> None:
        """Give all segments up."""
        for peer, segment in list(self._segments.items()):
            self._drop(peer, segment)

    def _drop(self, peer: str, segment: Segment) -> None:
        segment.unlink()
        if self._segments.get(peer) is segment:
            segment.close()
            del self._segments[peer]

    def _fall_back(self, peer: str, reason: str, *, for_good: bool = True) -> None:
        """``for_good`` unless it had mapped a segment: started anew, it may map another."""
        if self.mover == "shm" and not for_good:
            raise PeerLost(f"{peer} does not know the memory it shared: {reason}", field="mover", remedy="try again")
        if self.mover == "shm":
            message = f"this decode worker must hand over through shared memory, {peer} does not: {reason}"
            raise Incompatible(message, field="mover", remedy="one host and one /dev/shm for both, or mover auto")
        log.warning("handoffs from %s go over gRPC, not through shared memory: %s", peer, reason)
        self.counts["mover_fallbacks"] += 1
        if for_good:
            self._foreign.add(peer)


class Offer:
    """One stream's view of a segment that may be used once the prefill worker has said so in ``Begin``."""

    def __init__(self, offers: Offers, peer: str, segment: Segment | None) -> None:
        self.peer, self.segment = peer, segment
        self._offers, self._settled, self._accepted = offers, False, False

    @property
    def text(self) -> str:
        """For ``Open.segment``."""
        return self.segment.offer if self.segment else ""

    def begun(self, begin: Begin) -> None:
        """Raises Incompatible for a refusal where shared memory is demanded, TransferDamaged for one that was never
        offered."""
        if begin.mover == "shm" and self.segment is None:
            raise TransferDamaged("shared memory that was not offered", field="begin.mover")
        self._settled, self._accepted = True, begin.mover == "shm"
        self._offers.settle(self, begin)

    def view(self, place: Any) -> memoryview:
        """The payload at ``place``. Raises TransferDamaged where there is none."""
        if self.segment is None or not self._accepted:
            raise TransferDamaged("a place in memory that is not shared", field="frame.shm")
        return self.segment.view(place)

    def ended(self, *, lost: bool = False) -> None:
        """The stream is over; ``lost`` with the prefill worker, which maps another segment should it come back."""
        if not self._settled:
            self._settled = True
            self._offers.settle(self, None)
        if lost:
            self._offers.lost(self)
