"""How often and for how long one answer is tried again: which workers to leave alone, and when to give up."""

from __future__ import annotations

import time
from collections import OrderedDict

from pdspec.config import RouterConfig
from pdspec.errors import Overloaded, PdspecError, PeerLost, Quarantined

PAUSE_S = 0.5  # a worker that failed an answer gets it again after so long, if it lives
PROGRESS_TOKENS = 32  # an attempt that put out as many got somewhere: what ended it is not the request's doing
REMEMBERED = 4096  # quarantined request ids


class WorkerDied(PeerLost):
    """The worker broke off, or heartbeats found it lost, while it had this request."""


class Failures:
    """Of one answer. Times are monotonic seconds."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._failed: dict[str, float] = {}
        self._stuck_since = 0.0  # no token has come since this failure; 0: one has
        self._total = self._deaths = 0
        self.last: PdspecError | None = None

    def excluded(self) -> set[str]:
        """Addresses that failed just now."""
        now = time.monotonic()
        return {address for address, at in self._failed.items() if now - at < PAUSE_S}

    def note(self, address: str, error: PdspecError, *, progress: int) -> None:
        """An attempt on ``address`` failed after ``progress`` tokens of its own. Raises Quarantined or ``error`` when
        it was the last."""
        now = time.monotonic()
        self._failed[address], self.last = now, error
        died = isinstance(error, WorkerDied)
        if progress or not self._stuck_since:
            self._stuck_since = now
        if progress >= PROGRESS_TOKENS:
            self._deaths = 0
        self._deaths += died
        self._total += died or progress > 0
        if self._deaths >= self._config.quarantine_after:
            message = f"{self._deaths} workers were lost under this request, the last: {error.message}"
            raise Quarantined(message, remedy="it is not tried again; look into the workers' logs before you resend it")
        if self._total > self._config.max_replays or now - self._stuck_since > self._config.failover_wait_s:
            raise error

    def may_wait(self, error: PdspecError, *, since: float, coming: bool, sent: bool) -> bool:
        """Whether to stay, after ``error`` of routing; nobody could be chosen ``since``. ``coming``: some worker may
        come back; ``sent``: the client has tokens already."""
        if not isinstance(error, PeerLost | Overloaded):
            return False
        if isinstance(error, Overloaded) or isinstance(self.last, Overloaded):
            if not sent:
                return False
        elif not (coming or self.excluded()):
            return False
        return time.monotonic() - (self._stuck_since or since) < self._config.failover_wait_s


class Quarantine:
    """Ids of requests that are refused, the latest ``REMEMBERED``."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, request_id: str) -> None:
        """Refuse this id from now on."""
        self._ids[request_id] = None
        while len(self._ids) > REMEMBERED:
            self._ids.popitem(last=False)

    def check(self, request_id: str) -> None:
        """Raises Quarantined."""
        if request_id in self._ids:
            remedy = "look into the workers' logs; a new id tries it again"
            raise Quarantined("workers died under this request", field="request_id", remedy=remedy)
