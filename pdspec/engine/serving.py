"""What both roles' services share: one process with an engine thread and an asyncio thread that owns gRPC."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc

from pdspec.config import WorkerConfig
from pdspec.engine.resources import Resources
from pdspec.engine.thread import EngineThread
from pdspec.types import WorkerInfo
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import add_health, bind, make_server, service_name
from pdspec.wire.codec import worker_info_to_pb

log = logging.getLogger(__name__)
Register = Callable[[grpc.aio.Server], Any]


class StatusService(rpc.WorkerServicer):
    """``Worker/Status``: what the router decides from."""

    def __init__(self, info: Callable[[], WorkerInfo]) -> None:
        self._info = info

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        """The worker's state now."""
        return worker_info_to_pb(self._info())


def describe(resources: Resources, *, worker_id: str, role: str, address: str, queued: int, running: int, steps: int) -> WorkerInfo:
    """The Status of a worker."""
    pool, config = resources.pool, resources.files.config
    return WorkerInfo(
        worker_id=worker_id, role=role, address=address, model=resources.config.model, fingerprint=resources.digest,
        drafters=tuple(resources.drafters), queued=queued, running=running, free_pages=pool.free, total_pages=pool.num_pages,
        page_size=pool.page_size, max_context=config.max_context, vocab_size=config.vocab_size, steps=steps,
        metrics=dict(resources.metrics),
    )


class RunningWorker:
    """A started worker of this process. ``services`` are short names for health and reflection."""

    def __init__(self, config: WorkerConfig, engine: EngineThread, services: tuple[str, ...]) -> None:
        self.config, self.engine, self.address = config, engine, ""
        self._services = services
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._stopped = False

    def start(self, register: Register) -> None:
        """Bind, let ``register(server)`` add its services (``address`` is set by then), and serve. Raises ConfigError
        when the port is taken."""
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(register), self._loop).result()
        except BaseException:
            self.stop()
            raise

    async def _start(self, register: Register) -> None:
        server = make_server()
        self.address = bind(server, self.config.host, self.config.port)
        register(server)
        await add_health(server, [service_name(name) for name in (*self._services, "Worker")])
        await server.start()
        self._server = server

    def alive(self) -> bool:
        """Whether both threads still make progress; False is final."""
        return not self._stopped and self._thread.is_alive() and self.engine.alive()

    def stop(self) -> None:
        """Cut running calls, free the port, end both threads. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=15)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=15)
        self.engine.stop()

    async def _close(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
