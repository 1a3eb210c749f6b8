"""A worker as a process of its own, without Ray: parse flags, launch, say ``ready``, wait for a signal or a wish."""

from __future__ import annotations

import signal
import sys
import threading

from pdspec.config import WorkerConfig
from pdspec.errors import PdspecError
from pdspec.hosting import EXIT_STATUS, RunningWorker, launcher, settle
from pdspec.telemetry import setup_logging

POLL_S = 0.2


class _Signals:
    """SIGTERM drains, SIGINT ends at once; so does a second SIGTERM."""

    def __init__(self, drain_s: float) -> None:
        self.ended, self.hurry, self.drain_s = threading.Event(), threading.Event(), drain_s
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._came)

    def _came(self, number: int, _: object) -> None:
        if number == signal.SIGINT or self.ended.is_set():
            self.hurry.set()
        self.ended.set()


def run_worker(role: str) -> None:
    """Run until a signal or ``Worker/Drain`` ends it, in the role that the latter names where it names one. Exit status
    2 for settings that cannot work, 70 when the worker dies."""
    try:
        config = WorkerConfig.from_args(
            sys.argv[1:], prog=f"python -m {role}_worker", description=f"One {role} worker."
        )
        config = config.replace(role=role)
        setup_logging(config.log_level, name=config.worker_id or role, log_format=config.log_format)
        worker, signals = launcher(role)(config), _Signals(config.drain_s)
    except PdspecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    while True:
        settle()
        print(f"ready role={config.role} address={worker.address}", flush=True)
        role = _served(worker, signals)
        if not role:
            sys.exit(0)
        config = config.replace(role=role, port=int(worker.address.rpartition(":")[2]))
        del worker  # and with it weights and cache, before there are others
        settle()
        try:
            worker = launcher(role)(config)
        except PdspecError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_STATUS)


def _served(worker: RunningWorker, signals: _Signals) -> str:
    """From ready to stopped; the role that comes next, empty for none."""
    while not signals.ended.wait(POLL_S) and worker.alive() and worker.wish() is None:
        pass
    if not worker.alive():
        worker.stop()
        sys.exit(EXIT_STATUS)
    wish = None if signals.ended.is_set() else worker.wish()
    if not signals.hurry.is_set():
        worker.drain(signals.drain_s if wish is None else wish.deadline_s, signals.hurry)
    worker.stop()
    return wish.role if wish is not None and not signals.ended.is_set() else ""
