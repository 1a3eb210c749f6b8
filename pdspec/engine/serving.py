"""What both roles' services share: one process with an engine thread and an asyncio thread that owns gRPC."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from pdspec.config import WorkerConfig
from pdspec.engine.resources import Resources
from pdspec.engine.thread import EngineThread
from pdspec.errors import InvalidRequest
from pdspec.metrics import WorkerMetrics, exposed
from pdspec.tracing import Tracer
from pdspec.types import WorkerInfo
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import add_health, bind, make_server, service_name
from pdspec.wire.codec import worker_info_to_pb
from pdspec.wire.doors import Doors, Wish, wish_from_pb
from pdspec.wire.gate import Gate
from pdspec.wire.serving import ServiceThread
from pdspec.wire.trust import Trust

log = logging.getLogger(__name__)
Register = Callable[[grpc.aio.Server, str], Any]


class WorkerService(rpc.WorkerServicer):
    """``Worker/Status``, what the router decides from, and ``Worker/Drain``."""

    def __init__(self, info: Callable[[], WorkerInfo], doors: Doors, config: WorkerConfig) -> None:
        self._info, self._doors, self._config = info, doors, config

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        """The worker's state now."""
        return worker_info_to_pb(dataclasses.replace(self._info(), draining=self._doors.shut))

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        """Take nothing new from now on; the rest is done by whoever runs this process. Raises InvalidRequest."""
        wish = wish_from_pb(request, default_s=self._config.drain_s)
        if wish.role not in ("", self._config.role) and self._config.tp > 1:
            raise InvalidRequest("a worker of several ranks keeps its role", field="role", remedy="name no other one")
        self._doors.ask(wish)
        return await self.Status(pb.StatusRequest(), context)


def describe(
    resources: Resources, *, worker_id: str, role: str, address: str, queued: int, running: int, steps: int,
    stepping: int, **more: Any,
) -> WorkerInfo:  # fmt: skip
    """The Status of a worker."""
    pool, config = resources.pool, resources.files.config
    return WorkerInfo(
        worker_id=worker_id,
        role=role,
        address=address,
        model=resources.config.model,
        fingerprint=resources.digest,
        drafters=tuple(resources.drafters),
        queued=queued,
        running=running,
        free_pages=pool.free,
        total_pages=pool.num_pages,
        page_size=pool.page_size,
        max_context=config.max_context,
        vocab_size=config.vocab_size,
        steps=steps,
        stepping=stepping,
        metrics={**resources.metrics, "clock": time.time()},
        **more,
    )


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    address: str


@asynccontextmanager
async def serving(
    config: WorkerConfig, services: tuple[str, ...], register: Register, metrics: WorkerMetrics
) -> AsyncIterator[Served]:
    """Bind, let ``register(server, address)`` add the role's services, and serve until the block ends, which cuts
    running calls. ``services`` are short names for health and reflection. Raises ConfigError for a taken port."""
    trust = Trust.of(config)
    server = make_server(gate=Gate(trust))
    address = bind(server, config.host, config.port, trust.server_credentials(members=True))
    register(server, address)
    await add_health(server, [service_name(name) for name in (*services, "Worker")])
    with exposed(metrics, host=config.host, port=config.metrics_port):
        await server.start()
        try:
            yield Served(address)
        finally:
            await server.stop(grace=None)


class RunningWorker:
    """A started worker of this process: its engine thread and its asyncio thread, and the role's ``service`` that runs
    on the latter. Ends the engine if serving fails."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: EngineThread,
        services: tuple[str, ...],
        register: Register,
        metrics: WorkerMetrics,
        tracer: Tracer | None,
        service: Any = None,
    ) -> None:
        self.config, self.engine, self.metrics, self.tracer = config, engine, metrics, tracer
        self.service = service
        try:
            self._service = ServiceThread(lambda: serving(config, services, register, metrics), name="grpc")
        except BaseException:
            engine.stop()
            raise

    @property
    def address(self) -> str:
        """``host:port``."""
        return self._service.address

    def alive(self) -> bool:
        """Whether both threads still make progress, and other ranks live; False is final."""
        return self._service.alive() and self.engine.alive() and self.engine.host.resources.alive()

    def wish(self) -> Wish | None:
        """What ``Worker/Drain`` asked for, if it was called."""
        wish: Wish | None = self.service.doors.wish
        return wish

    def drain(self, deadline_s: float, hurry: threading.Event) -> None:
        """Take nothing new and return when nobody is inside: after ``deadline_s``, or when ``hurry`` is set, calls that
        still run are sent elsewhere."""
        doors: Doors = self.service.doors
        log.info("draining: %d calls may take %g s", len(doors), deadline_s)
        if left := doors.drain(self._service.call, deadline_s, hurry):
            log.warning("drained: %d calls were sent to other workers", left)

    def stop(self) -> None:
        """Cut running calls, free the port, end both threads. Idempotent."""
        self._service.stop(timeout_s=15)
        self.engine.stop()
        if self.tracer:
            self.tracer.close()
