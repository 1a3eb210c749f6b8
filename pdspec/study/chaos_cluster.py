"""A stack whose processes are killed and stopped on purpose, and started anew as an operator's supervisor would."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any

import grpc

from pdspec.errors import ConfigError
from pdspec.study.stack import Stack
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.doors import ask_to_drain
from pdspec.wire.trust import Trust

POLL_S = 0.25
SETTLE_S = 5.0  # after the last answer: then nothing may be held any more
_INJECTED = re.compile(r"injected (\w+) into a \w+ frame of epoch=(\d+)")
_LANDED = re.compile(r"landed whole epoch=(\d+)")
_DIED_UNDER = re.compile(r"\[([^\]]+)\]: \S+ failed after (\d+) tokens: (.*)")


class ChaosCluster(Stack):
    """Respawns whatever ends, on its old port. ``crashes`` are ends that nobody asked for."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.crashes: list[str] = []
        self.respawn_s: list[float] = []  # from a death to the ready line
        self._killed: set[str] = set()
        self._down: set[str] = set()
        self._over = threading.Event()
        self._seen: dict[tuple[str, int], dict[str, float]] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> ChaosCluster:
        super().__enter__()
        for name in self.processes:
            thread = threading.Thread(target=self._keep, args=(name,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def names(self, role: str) -> list[str]:
        """Processes of a role."""
        return [name for name in self.processes if name.split("-")[0] == role]

    def up(self, role: str) -> list[str]:
        """Those of them that serve."""
        return [name for name in self.names(role) if name not in self._down]

    def address_of(self, name: str) -> str:
        """``host:port``, the same for all its lives."""
        if name == "router":
            return self.endpoint
        role, _, index = name.partition("-")
        return self.relay if name == "relay" else self.addresses[role][int(index)]

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._killed.add(name)
        self._down.add(name)
        self.processes[name].send_signal(signal.SIGKILL)

    def drain(self, name: str) -> None:
        """SIGTERM: it ends when its calls have, or when its ``drain_s`` is over."""
        self._killed.add(name)
        self._down.add(name)
        self.processes[name].send_signal(signal.SIGTERM)

    def switch(self, name: str, role: str, deadline_s: float) -> None:
        """Have a worker drained and serve ``role`` from then on, in the same process."""
        ask_to_drain(self.address_of(name), role, deadline_s, Trust.of(self.worker))

    def pause(self, name: str, seconds: float) -> None:
        """SIGSTOP now, SIGCONT after ``seconds``, unless it was killed meanwhile."""
        process = self.processes[name]
        self._down.add(name)
        process.send_signal(signal.SIGSTOP)

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            if self.processes.get(name) is process and process.poll() is None:
                self._down.discard(name)

        timer = threading.Timer(seconds, go_on)
        timer.daemon = True
        timer.start()

    def status(self, name: str, *, timeout_s: float = 2.0) -> pb.WorkerStatus | None:
        """A worker's own Status, None when it does not answer."""
        with grpc.insecure_channel(self.address_of(name)) as channel:
            try:
                return rpc.WorkerStub(channel).Status(pb.StatusRequest(), timeout=timeout_s)
            except grpc.RpcError:
                return None

    def watch(self) -> None:
        """Remember the counters of every worker's present life; call it now and then."""
        for name in (*self.names("prefill"), *self.names("decode")):
            process = self.processes[name]
            if name not in self._down and (status := self.status(name, timeout_s=0.5)):
                self._seen[name, process.pid] = dict(status.metrics)

    def counted(self, metric: str) -> int:
        """A counter over all lives of all workers, as last seen."""
        return int(sum(metrics.get(metric, 0.0) for metrics in self._seen.values()))

    def frame_faults(self) -> tuple[Counter[str], int, int]:
        """Injected by kind; handoffs that met one; and those of them that were landed as if whole."""
        found = [match for name in self.names("prefill") for match in _INJECTED.findall(self.log(name))]
        landed = {epoch for name in self.names("decode") for epoch in _LANDED.findall(self.log(name))}
        damaged = {epoch for _, epoch in found}
        return Counter(kind for kind, _ in found), len(damaged), len(damaged & landed)

    def died_under(self) -> set[str]:
        """Ids of requests that had sent tokens when their decode worker died; stopped ones are not meant."""
        found = _DIED_UNDER.findall(self.log("router"))
        return {name for name, tokens, why in found if int(tokens) > 0 and "DEADLINE_EXCEEDED" not in why}

    def stop(self) -> None:
        """Wake what is stopped, and end everything."""
        self._over.set()
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
        for thread in self._threads:
            thread.join(5.0)
        super().stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _keep(self, name: str) -> None:
        port = int(self.address_of(name).rpartition(":")[2])
        while not self._over.wait(0.02):
            process = self.processes[name]
            if process.poll() is None:
                continue
            began = time.monotonic()
            if name not in self._killed:
                self.crashes.append(f"{name}: exit status {process.returncode}: {self.log(name)[-300:]}")
            self._killed.discard(name)
            self._down.add(name)
            if process.stdout is not None:
                process.stdout.close()
            module, config = self.started[name]
            try:
                self._spawn(name, module, config.replace(port=port))
                self._address(name)
            except (ConfigError, subprocess.SubprocessError) as error:
                if not self._over.is_set() and name not in self._killed:
                    self.crashes.append(f"{name} did not start anew: {error}")
                continue
            self.respawn_s.append(time.monotonic() - began)
            self._down.discard(name)


def settle(cluster: ChaosCluster) -> dict[str, int]:
    """What workers still hold ``SETTLE_S`` after everyone has come back; pages that nobody runs are leaked."""
    workers = (*cluster.names("prefill"), *cluster.names("decode"))
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline and any(cluster.status(name) is None for name in workers):
        time.sleep(0.1)
    deadline, held = time.monotonic() + SETTLE_S, {"orphans": 1, "leaked_pages": 0, "silent": 0}
    while time.monotonic() < deadline and any(held.values()):
        states = [cluster.status(name) for name in workers]
        held = {
            "orphans": sum(state.running + state.queued for state in states if state),
            "leaked_pages": sum(state.total_pages - state.free_pages for state in states if state),
            "silent": sum(state is None for state in states),
        }
        time.sleep(0.1)
    cluster.watch()
    return held
