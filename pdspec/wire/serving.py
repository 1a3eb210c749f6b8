"""Run an asyncio service to its end: in the foreground of a process, or on a thread beside others."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Protocol, TypeVar

from pdspec.config import HttpConfig, RouterConfig
from pdspec.errors import ConfigError, PdspecError
from pdspec.telemetry import setup_logging
from pdspec.wire.memory import keep_freed_memory


class Service(Protocol):
    """What a service's context manager yields once it serves."""

    @property
    def address(self) -> str:
        """``host:port``."""


S = TypeVar("S", bound=Service)
C = TypeVar("C", RouterConfig, HttpConfig)


def run_in_foreground(
    make: Callable[[], AbstractAsyncContextManager[Service]], role: str, *, drain_s: float = 0.0
) -> int:
    """Serve until SIGINT, or SIGTERM, which makes the service's ``grace_s`` the ``drain_s`` that calls under way may
    take to end. Prints one line, ``ready role=… address=…``, on stdout when it serves, and a typed error on stderr when
    it cannot. Returns the exit status."""

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        keep_freed_memory()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, stop.set)
        async with make() as service:
            print(f"ready role={role} address={service.address}", flush=True)
            if drain_s:
                loop.add_signal_handler(signal.SIGTERM, _drain, service, stop, drain_s)
            await stop.wait()
            for name in (signal.SIGINT, signal.SIGTERM):  # whoever asks again does not want to wait
                loop.add_signal_handler(name, os._exit, 0)

    try:
        asyncio.run(main())
    except PdspecError as error:
        print(f"{role}: {error}", file=sys.stderr)
        return 1
    return 0


def _drain(service: Any, stop: asyncio.Event, drain_s: float) -> None:
    service.grace_s = drain_s
    stop.set()


def serve_command(
    argv: list[str], settings: type[C], serving: Callable[[C], AbstractAsyncContextManager[Service]], *, role: str,
    module: str, description: str,
) -> int:  # fmt: skip
    """The command line ``python -m module`` of a role without Ray. Returns the exit status."""
    try:
        config = settings.from_args(argv, prog=f"python -m {module}", description=description)
    except ConfigError as error:
        print(f"{role}: {error}", file=sys.stderr)
        return 1
    setup_logging(config.log_level, name=role, log_format=config.log_format)
    return run_in_foreground(lambda: serving(config), role, drain_s=config.drain_s)


class ServiceThread(Generic[S]):
    """A service on a thread with an event loop of its own. The constructor returns when it serves, and raises what its
    start raised."""

    def __init__(self, make: Callable[[], AbstractAsyncContextManager[S]], *, name: str) -> None:
        self._make = make
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def address(self) -> str:
        """``host:port``."""
        return self.service.address

    def alive(self) -> bool:
        """Whether the thread still serves."""
        return self._thread.is_alive() and self._failure is None

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run ``function`` on the service's event loop, soon, in the order of the calls; from any thread."""
        self._loop.call_soon_threadsafe(lambda: function(*args, **kwargs))

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the service and wait for its thread; a second call does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001  handed to the constructor, or seen through alive()
            self._failure = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._make() as service:
            self.service = service
            self._started.set()
            await self._stop.wait()
