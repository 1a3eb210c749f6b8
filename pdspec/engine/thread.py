"""The engine thread: owns torch, scheduler and pools; everyone else sends it commands and gets futures.

    asyncio thread ── call(fn) ──▶ command queue ──▶ engine thread: commands, then one step, then commands …
                   ◀─ loop.call_soon_threadsafe ── events

Only this thread allocates and frees pages. A step that raises is a bug and ends the thread (crash-only): ``alive``
turns False, and whoever placed the worker starts a new one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from pdspec.errors import PeerLost

log = logging.getLogger(__name__)
T = TypeVar("T")


def tell(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *values: Any) -> None:
    """Run ``function`` on an event loop, from the engine thread. A loop that has closed has nobody who listens."""
    try:
        loop.call_soon_threadsafe(function, *values)
    except RuntimeError:
        if not loop.is_closed():
            raise


class Host(Protocol):
    """What runs on an engine thread."""

    def step(self) -> bool:
        """Do some work; False when there is none."""

    def check_integrity(self) -> None:
        """Raise when pages are lost or owned twice; called whenever the thread becomes idle."""

    def close(self) -> None:
        """Give everything back."""


class EngineThread:
    """Runs a host made on the thread itself (torch stays there). ``start`` raises what making it raised."""

    def __init__(self, make: Callable[[], Host], name: str) -> None:
        self._commands: queue.SimpleQueue[tuple[concurrent.futures.Future, Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._made: concurrent.futures.Future[Host] = concurrent.futures.Future()
        self._make = make
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.failure: BaseException | None = None
        self._over = False  # no command runs any more
        self.host: Any = None  # what ``start`` returned; its methods belong on the engine thread

    def start(self) -> Host:
        """Make the host and begin; blocks until it stands."""
        self._thread.start()
        self.host = self._made.result()
        return self.host

    def alive(self) -> bool:
        """Whether steps are still being made."""
        return self._thread.is_alive() and not self._over and self.failure is None

    def post(self, command: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run ``command`` between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        if not self.alive():
            future.set_exception(_ended())
            return future
        self._commands.put((future, command))
        if self._over:  # it ended meanwhile, perhaps after telling those who waited
            self._fail_pending()
        return future

    async def call(self, command: Callable[[], T]) -> T:
        """``post`` for coroutines. Cancelling the wait does not cancel the command."""
        return await asyncio.shield(asyncio.wrap_future(self.post(command)))

    def stop(self) -> None:
        """End after the current step; idempotent."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            host = self._make()
        except BaseException as error:  # noqa: BLE001  start() raises it
            self.failure = error
            self._made.set_exception(error)
            return
        self._made.set_result(host)
        try:
            self._serve(host)
        except BaseException as error:
            self.failure = error
            log.critical("the engine thread ends", exc_info=error)
        finally:
            self._over = True
            self._fail_pending()
            host.close()

    def _serve(self, host: Host) -> None:
        busy = False
        while True:
            try:
                item = self._commands.get_nowait() if busy else self._commands.get()
            except queue.Empty:
                busy = host.step()
                if not busy:
                    host.check_integrity()
                continue
            if item is None:
                return
            _execute(*item)
            busy = True

    def _fail_pending(self) -> None:
        while True:
            try:
                item = self._commands.get_nowait()
            except queue.Empty:
                return
            if item is not None and item[0].set_running_or_notify_cancel():
                item[0].set_exception(_ended())


def _ended() -> PeerLost:
    return PeerLost("the engine of this worker has ended", remedy="try again: another worker, or this one restarted")


def _execute(future: concurrent.futures.Future, command: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(command())
    except BaseException as error:  # noqa: BLE001  whoever waits for the command gets it
        future.set_exception(error)
