"""A service of this project as a process of its own, and what it costs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdspec.errors import ConfigError

_STOP_S = 10.0


@dataclass(frozen=True)
class Running:
    """``address`` is where it listens."""

    pid: int
    address: str

    def cpu_seconds(self) -> float:
        """Time on a core so far, of all its threads, to the nanosecond (Linux)."""
        return cpu_seconds(self.pid)


def cpu_seconds(pid: int | str) -> float:
    """Time on a core of all threads of a process that live (Linux)."""
    total = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
            continue
    return total / 1e9


def pin(pid: int, cores: Collection[int]) -> None:
    """All threads of a process onto these cores, and those that they start (Linux)."""
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that ended meanwhile
            os.sched_setaffinity(int(path.name), cores)


@contextmanager
def process(module: str, *arguments: str) -> Iterator[Running]:
    """``python -m module arguments`` from its ``ready`` line to the end of the block. Raises ConfigError when it ends
    before."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            if not line.startswith("ready "):
                raise ConfigError(f"{module} did not start", field="process", remedy="see what it wrote to stderr")
            yield Running(started.pid, line.strip().rpartition("address=")[2])
        finally:
            started.terminate()
            try:
                started.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                started.kill()
