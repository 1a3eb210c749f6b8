"""A worker's way out: it takes nothing new, waits for what it has, and sends the rest elsewhere.

    Worker/Drain, SIGTERM ─▶ shut ─▶ new calls are refused (PeerLost: ask another) ─▶ nobody inside, or time is over
                          ─▶ who is inside is told so (PeerLost), and goes on elsewhere ─▶ end, or the other role
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from pdspec.config import ROLES
from pdspec.errors import InvalidRequest, PdspecError, PeerLost
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_client_channel
from pdspec.wire.status import from_peer_error
from pdspec.wire.trust import Trust

POLL_S = 0.05
ASK_S = 5.0
LONGEST_S = 7 * 86400.0
LEAVE_S = 2.0  # for those who were sent away to be gone
SendAway = Callable[[PdspecError], object]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What ``Worker/Drain`` asked for: calls under way may take ``deadline_s``, then the process serves ``role``, or
    ends where that is empty."""

    role: str
    deadline_s: float


class Doors:
    """Who is inside a worker. But for ``drain`` all belongs on the service's event loop."""

    def __init__(self) -> None:
        self.shut = False
        self.wish: Wish | None = None
        self._inside: dict[object, SendAway] = {}

    def __len__(self) -> int:
        return len(self._inside)

    @contextmanager
    def inside(self, send_away: SendAway) -> Iterator[None]:
        """Around a call; ``send_away`` ends it with an error. Raises PeerLost where the doors are shut."""
        if self.shut:
            raise _moved()
        key = object()
        self._inside[key] = send_away
        try:
            yield
        finally:
            del self._inside[key]

    def ask(self, wish: Wish) -> None:
        """Shut, and remember what comes next; a second wish takes the place of the first."""
        self.shut, self.wish = True, wish

    def close(self) -> None:
        """Nobody enters any more."""
        self.shut = True

    def empty(self) -> None:
        """End every call that is inside."""
        for send_away in list(self._inside.values()):
            send_away(_moved())

    def drain(self, call: Callable[[Callable[[], None]], None], deadline_s: float, hurry: threading.Event) -> int:
        """From another thread: shut, wait, send away; returns how many were sent away. ``call`` runs a function on the
        service's event loop; ``hurry`` ends the wait."""
        call(self.close)
        until = time.monotonic() + deadline_s
        time.sleep(POLL_S)  # a call that is just coming in is inside, or refused
        while len(self) and time.monotonic() < until and not hurry.wait(POLL_S):
            pass
        left = len(self)
        if left:
            call(self.empty)
        gone = time.monotonic() + LEAVE_S
        while len(self) and time.monotonic() < gone:
            time.sleep(POLL_S)
        return left


def wish_from_pb(message: pb.DrainRequest, *, default_s: float) -> Wish:
    """Raises InvalidRequest for another role and for a time that is none."""
    if message.role not in ("", *ROLES):
        raise InvalidRequest(f"no role {message.role!r}", field="role", remedy="prefill, decode, or nothing: end")
    deadline_s = message.deadline_s if message.HasField("deadline_s") else default_s
    if not 0 <= deadline_s <= LONGEST_S:
        raise InvalidRequest(f"{deadline_s} s are no time to drain in", field="deadline_s",
                             remedy=f"0 to {LONGEST_S:g}")
    return Wish(role=message.role, deadline_s=deadline_s)


def ask_to_drain(address: str, role: str, deadline_s: float | None, trust: Trust) -> None:
    """``Worker/Drain`` of the worker at ``address``; None: its own ``drain_s``. Raises what the worker says, PeerLost
    when it does not answer."""
    with make_client_channel(address, trust) as channel:
        try:
            rpc.WorkerStub(channel).Drain(
                pb.DrainRequest(role=role, deadline_s=deadline_s), timeout=ASK_S, metadata=trust.metadata()
            )
        except grpc.RpcError as error:
            raise from_peer_error(error, peer=address) from error


def _moved() -> PeerLost:
    return PeerLost("this worker is draining", remedy="ask another worker")
