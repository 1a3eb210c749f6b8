"""Deployments that outlive the command that started them: a background ``pdspec up`` of its own session, and a file
in the cache folder that says which process it is."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pdspec.cli.output import spinner
from pdspec.config import ClusterConfig
from pdspec.errors import ConfigError, PdspecError
from pdspec.model.store import cache_root

STOP_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detached:
    """One background deployment. ``started`` is the process's start time in the system's own ticks, so that a
    recycled process id is not taken for it."""

    pid: int
    started: str
    endpoint: str
    log: str
    path: Path

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        return _start_time(self.pid) == self.started


def start(config: ClusterConfig, console: Console) -> Detached:
    """Run ``config`` in the background and return when it is ready. Raises its error when it ends before."""
    folder = _folder(config.worker.cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        settings, log = folder / f"{stem}.config.json", folder / f"{stem}.log"
        settings.write_text(json.dumps(config.to_mapping()))
    except OSError as error:
        remedy = "name a folder that can be written with --set worker.cache_dir=… or PDSPEC_CACHE"
        raise ConfigError(f"cannot write {folder}: {error.strerror}", field="cache_dir", remedy=remedy) from error
    command = [sys.executable, "-m", "pdspec", "up", "--config", str(settings)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        endpoint = _await_ready(process, log, console)
    except BaseException:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
        raise
    finally:
        settings.unlink()
    path = folder / f"{stem}.json"
    state = Detached(
        pid=process.pid, started=_start_time(process.pid), endpoint=endpoint, log=str(log), path=path
    )
    record = {key: value for key, value in dataclasses.asdict(state).items() if key != "path"}
    path.write_text(json.dumps(record))
    return state


def running(cache_dir: str = "") -> Iterator[Detached]:
    """The background deployments that still run; records of others are removed."""
    for path in sorted(_folder(cache_dir).glob("*.json")):
        if path.name.endswith(".config.json"):
            continue
        state = Detached(path=path, **json.loads(path.read_text()))
        if state.alive:
            yield state
        else:
            path.unlink()


def stop(state: Detached) -> None:
    """End it and wait. Raises PdspecError when it does not end."""
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while state.alive:
        if time.monotonic() > deadline:
            raise PdspecError(f"process {state.pid} does not end", remedy=f"see {state.log}, then kill it")
        time.sleep(0.1)
    state.path.unlink()


def _await_ready(process: subprocess.Popen, log: Path, console: Console) -> str:
    with spinner(console, "starting in the background"):
        while True:
            ended = process.poll() is not None
            lines = log.read_text(errors="replace").splitlines()
            for line in lines:
                if line.startswith("ready "):
                    return line.split()[1]
            if ended:
                errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
                raise PdspecError(errors[-1] if errors else f"it ended before it was ready; see {log}")
            time.sleep(0.1)


def _folder(cache_dir: str) -> Path:
    return cache_root(cache_dir) / "run"


def _start_time(pid: int) -> str:
    """Field 22 of /proc/pid/stat; empty when there is no such process, or it has ended and was not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
