"""A worker as a process of its own, without Ray: parse flags, launch, say ``ready``, wait for a signal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

from pdspec.config import WorkerConfig
from pdspec.errors import PdspecError
from pdspec.hosting import Running, settle
from pdspec.telemetry import setup_logging

POLL_S = 0.5


def run_worker(role: str, launch: Callable[[WorkerConfig], Running]) -> None:
    """Run until SIGINT or SIGTERM. Exit status 2 for settings that cannot work, 70 when the worker dies."""
    try:
        config = WorkerConfig.from_args(
            sys.argv[1:], prog=f"python -m {role}_worker", description=f"One {role} worker."
        )
        config = config.replace(role=role)
        setup_logging(config.log_level, name=config.worker_id or role, log_format=config.log_format)
        worker = launch(config)
    except PdspecError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    settle()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    print(f"ready role={role} address={worker.address}", flush=True)
    while not ended.wait(POLL_S) and worker.alive():
        pass
    died = not worker.alive()
    worker.stop()
    sys.exit(70 if died else 0)
