"""What a call must pass before a service sees it: proof of who calls, and how often that caller may."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict

import grpc

from pdspec.errors import Overloaded
from pdspec.wire.trust import AUTHORIZATION, OPEN, Metadata, Trust

REQUEST_TIMEOUT_S = 10.0
_MAX_CALLERS = 4096  # whose rates are remembered


class Gate:
    """``members``: the port of a worker or relay, for members of the cluster alone. ``rate``: calls per second of one
    caller (its token, else its host), in bursts of as many as two seconds bring; 0: any number.
    ``request_timeout_s``: for a unary request to be there whole, once its call is open."""

    def __init__(
        self,
        trust: Trust = OPEN,
        *,
        members: bool = True,
        rate: float = 0.0,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self.request_timeout_s = request_timeout_s
        self._trust, self._members, self._rate = trust, members, rate
        self._burst = max(1.0, 2 * rate)
        self._allowed: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller → (calls left, at)

    def enter(self, method: str, context: grpc.aio.ServicerContext) -> None:
        """Raises Unauthenticated, or Overloaded for a caller that calls too often."""
        metadata: Metadata = tuple(context.invocation_metadata() or ())
        self._trust.check(method, metadata, members=self._members)
        if self._rate and not method.startswith("/grpc."):
            self._count(caller_of(metadata, context.peer()))

    def _count(self, caller: str) -> None:
        now = time.monotonic()
        left, at = self._allowed.pop(caller, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        self._allowed[caller] = (left - 1 if left >= 1 else left, now)
        if len(self._allowed) > _MAX_CALLERS:
            self._allowed.popitem(last=False)
        if left < 1:
            wait_ms = int(1e3 * (1 - left) / self._rate) + 1
            message = f"more than {self._rate:g} requests per second from one user"
            raise Overloaded(message, retry_after_ms=wait_ms, field="client_rate", remedy=f"wait {wait_ms} ms")


def caller_of(metadata: Metadata, peer: str) -> str:
    """Who calls: its token, without the secret itself, else its host."""
    for key, value in metadata:
        if key == AUTHORIZATION:
            return hashlib.sha256(str(value).encode()).hexdigest()
    return peer.rpartition(":")[0]
