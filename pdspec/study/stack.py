"""A whole deployment as plain processes, without Ray: what checks and benchmarks run against.

    with Stack(WorkerConfig(model="tiny"), prefill=1, decode=1) as stack, RouterClient(stack.endpoint) as client:
        client.generate(UserRequest(text="Hello"))

Real sockets, real processes, nothing left behind: whatever ends the block ends them all.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import grpc

from pdspec.client import Access, RouterClient
from pdspec.config import RouterConfig, WorkerConfig
from pdspec.errors import ConfigError
from pdspec.settings import Settings
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_client_channel
from pdspec.wire.status import from_peer_error

_READY = re.compile(r"ready role=(\S+) address=(\S+)")
_STOP_S = 10.0


class Stack:
    """``prefill`` and ``decode`` workers (0 prefill: colocated), a router and its relay. ``prefill_changes`` and
    ``decode_changes`` are config keys of one role, ``router_changes`` those of router and relay, whose certificates and
    cluster token are the workers'."""

    def __init__(
        self, worker: WorkerConfig, *, prefill: int = 1, decode: int = 1, prefill_changes: dict[str, Any] | None = None,
        decode_changes: dict[str, Any] | None = None, router_changes: dict[str, Any] | None = None,
        start_timeout_s: float = 180.0, progress: Callable[[str], object] = lambda text: None,
    ) -> None:  # fmt: skip
        self.worker, self.counts = worker, {"prefill": prefill, "decode": decode}
        self.changes = {"prefill": prefill_changes or {}, "decode": decode_changes or {}}
        self.router = RouterConfig.from_mapping({
            "port": 0, "model": worker.model, "cache_dir": worker.cache_dir, "tls": worker.tls,
            "cluster_token_file": worker.cluster_token_file, **(router_changes or {}),
        })  # fmt: skip
        self.start_timeout_s, self.progress = start_timeout_s, progress
        self.endpoint, self.relay = "", ""
        self.addresses: dict[str, list[str]] = {"prefill": [], "decode": []}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.started: dict[str, tuple[str, Settings]] = {}  # module and config of each process
        self._folder = tempfile.TemporaryDirectory(prefix="pdspec-stack-")
        self._logs: dict[str, IO[str]] = {}

    def __enter__(self) -> Self:
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start_all(self) -> None:
        self.progress("starting workers")
        for role in self.counts:
            for index in range(self.counts[role]):
                name = f"{role}-{index}"
                config = self.worker.replace(**self.changes[role], role=role, port=0, worker_id=name)
                self._spawn(name, f"{role}_worker", config)
        router = self.router
        self._spawn("relay", "router.relay", router)
        for name in list(self.processes):
            address = self._address(name)
            if name == "relay":
                self.relay = address
            else:
                self.addresses[name.split("-")[0]].append(address)
        router = router.replace(
            relay=self.relay, prefill=tuple(self.addresses["prefill"]),
            decode=tuple(self.addresses["decode"]),
        )  # fmt: skip
        self._spawn("router", "router", router)
        self.endpoint = self._address("router")
        with RouterClient(self.endpoint, Access.of(router)) as client:
            client.wait_ready(workers=sum(self.counts.values()), timeout_s=self.start_timeout_s)

    def _spawn(self, name: str, module: str, config: Settings) -> None:
        path = Path(self._folder.name) / f"{name}.json"
        path.write_text(json.dumps(config.to_mapping()), encoding="utf-8")
        self.started[name] = module, config
        log = self._logs[name] = open(path.with_suffix(".log"), "a+", encoding="utf-8")  # noqa: SIM115  closed in stop
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(path)], stdout=subprocess.PIPE, stderr=log, text=True
        )

    def _address(self, name: str) -> str:
        """Wait for the ``ready`` line of a process. Raises ConfigError with the end of its log if it does not come."""
        process, deadline = self.processes[name], time.monotonic() + self.start_timeout_s
        assert process.stdout is not None
        while time.monotonic() < deadline:
            line = process.stdout.readline()
            if found := _READY.search(line):
                return found[2]
            if not line and process.poll() is not None:
                break
        raise ConfigError(f"{name} did not start: {self.log(name)[-600:]}", field=name, remedy="see its log above")

    def status_of(self, address: str, *, timeout_s: float = 5.0) -> pb.WorkerStatus:
        """A worker's own Status. Raises PeerLost when it does not answer."""
        with make_client_channel(address) as channel:
            try:
                return rpc.WorkerStub(channel).Status(pb.StatusRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                raise from_peer_error(error, peer=address) from error

    def log(self, name: str) -> str:
        """What a process wrote to stderr so far."""
        return (Path(self._folder.name) / f"{name}.log").read_text(encoding="utf-8")

    def stop(self) -> None:
        """End every process and remove the files. Safe to repeat."""
        for process in self.processes.values():
            process.send_signal(signal.SIGINT)  # SIGTERM drains
        for process in self.processes.values():
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for log in self._logs.values():
            log.close()
        self.processes.clear()
        self._folder.cleanup()
