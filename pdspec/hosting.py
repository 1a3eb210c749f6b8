"""What a role's actor has in common: it starts the role's service in its own process and keeps watch over it.

``launch`` of a role starts the engine thread and the asyncio thread in this process and returns a
``Running``; tokens and KV then travel over gRPC, never through the host. The watch is crash-only: a service that
is no longer alive ends its process, and whoever placed it (Ray) starts a new one.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, cast

from pdspec.errors import PdspecError
from pdspec.telemetry import setup_logging, usable_cores
from pdspec.wire.doors import Wish
from pdspec.wire.memory import keep_freed_memory
from pdspec.wire.status import error_to_dict

log = logging.getLogger(__name__)
WATCH_S = 0.5
EXIT_STATUS = 70  # EX_SOFTWARE: not a wanted exit, so Ray restarts the actor


class Running(Protocol):
    """A service that runs in this process."""

    @property
    def address(self) -> str:
        """``host:port`` that others reach it at."""

    def alive(self) -> bool:
        """Whether its threads still make progress; False is final."""

    def stop(self) -> None:
        """End its threads and close its port; a second call does nothing."""


class RunningWorker(Running, Protocol):
    """A worker that runs in this process: what ``<role>_worker.service.launch`` returns."""

    def wish(self) -> Wish | None:
        """What ``Worker/Drain`` asked for, if it was called."""

    def drain(self, deadline_s: float, hurry: threading.Event) -> None:
        """Take nothing new; return when nobody is inside. See Doors."""


def launcher(role: str) -> Callable[..., RunningWorker]:
    """``launch`` of a role. Imports torch."""
    return cast(Callable[..., RunningWorker], import_module(f"{role}_worker.service").launch)


class Host:
    """Starts ``launch()`` and answers for it. ``announce(address)`` is called after every start.

    A ``PdspecError`` of the first start is kept for ``failure`` instead of raised, since it is the user's to read;
    after a restart (``restarted``) nobody asks, so the process ends and is started once more after a pause.
    """

    def __init__(
        self,
        launch: Callable[[], Running],
        *,
        announce: Callable[[str], None] = lambda address: None,
        restarted: bool = False,
        name: str = "",
        log_level: str = "info",
        log_format: str = "text",
    ) -> None:
        setup_logging(log_level, name=name, log_format=log_format)
        self._running: Running | None = None
        self._failure: PdspecError | None = None
        self._stopped = threading.Event()
        try:
            self._running = launch()
        except PdspecError as error:
            if restarted:
                log.error("restart failed: %s", error)
                self._stopped.wait(2.0)
                os._exit(EXIT_STATUS)
            self._failure = error
            return
        settle()
        announce(self._running.address)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def failure(self) -> dict[str, Any] | None:
        """Why the service did not start (``wire.status.error_to_dict``), None when it did."""
        return error_to_dict(self._failure) if self._failure else None

    def address(self) -> str:
        """``host:port`` of the running service, empty when it did not start."""
        return self._running.address if self._running else ""

    def process_id(self) -> int:
        """Of the process that runs the service."""
        return os.getpid()

    def stop(self) -> None:
        """End the service; the process stays."""
        self._stopped.set()
        if self._running:
            self._running.stop()

    def running(self) -> Running:
        """The service. Raises the error of its start."""
        if self._running is None:
            raise self._failure or PdspecError("the service was never started")
        return self._running

    def _watch(self) -> None:
        while not self._stopped.wait(WATCH_S):
            if not self.running().alive():
                log.critical("the service is dead; ending the process")
                os._exit(EXIT_STATUS)
            self._look()

    def _look(self) -> None:
        """Twice a second, while the service lives."""


def settle() -> None:
    """What stands once a worker has started stays until it ends: the garbage collector need not visit the hundreds of
    thousands of objects of torch and its kin between decode steps (a pause of 0.1 s and more). And what messages leave
    behind is used again."""
    gc.unfreeze()  # what an earlier role left
    gc.collect()
    gc.freeze()
    keep_freed_memory()


def claim_cores(threads: int) -> None:
    """Give torch ``threads`` threads (0: all cores). Call before torch is imported: Ray sets ``OMP_NUM_THREADS=1``
    for actors with a fraction of a CPU, and OpenMP reads it once."""
    os.environ["OMP_NUM_THREADS"] = str(threads or usable_cores())
