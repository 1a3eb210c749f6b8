"""The gRPC face of the router, and how it is started."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2

from pdspec.answer_text import AnswerText
from pdspec.config import RouterConfig
from pdspec.errors import PdspecError, Quarantined
from pdspec.metrics import RouterMetrics, exposed
from pdspec.model.tokenizer import load_tokenizer
from pdspec.telemetry import REQUEST_ID
from pdspec.tracing import tracer_of
from pdspec.types import GenerateRequest, Handoff, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import add_health, bind, make_server, service_name
from pdspec.wire.codec import user_request_from_pb, worker_info_to_pb
from pdspec.wire.gate import Gate, caller_of
from pdspec.wire.serving import ServiceThread
from pdspec.wire.trust import OPEN, Trust
from router.admission import RouterTokenizer, admit
from router.answer import Answer
from router.failover import Quarantine
from router.fleet import Fleet
from router.live import ID_BYTES, LiveRequests
from router.policy import WorkerState, WorkerView
from router.prefixes import PrefixMap
from router.turnstile import Turnstile

log = logging.getLogger(__name__)
ROUTER = service_name("Router")


class RouterService(rpc.RouterServicer):
    """``pdspec.v1.Router`` over a fleet. ``address`` is where it listens, once it does."""

    def __init__(self, config: RouterConfig, tokenizer: RouterTokenizer, trust: Trust = OPEN) -> None:
        self.config, self.address, self.grace_s = config, "", 0.0
        self.fleet = Fleet(
            heartbeat_s=config.heartbeat_s, lost_after_s=config.lost_after_s, stall_s=config.stall_s,
            on_change=self._changed, trust=trust,
        )  # fmt: skip
        self.turnstile = Turnstile(config, self.fleet.views)
        self.metrics = RouterMetrics(
            running=lambda: len(self._live), workers=self._count_workers, waiting=lambda: len(self.turnstile.queue)
        )
        self.tracer = tracer_of(config.traces, "router")
        self._live = LiveRequests(self.metrics, self.tracer)
        self._quarantine = Quarantine()
        self._prefixes = PrefixMap()
        self._tokenizer = tokenizer
        self._health: health.aio.HealthServicer | None = None
        self._serving: bool | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def Generate(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """One answer: a message per verification, the last one with finish reason and statistics."""
        began, asked_at = time.perf_counter(), time.monotonic()
        try:
            user = user_request_from_pb(message)
            self._quarantine.check(user.request_id)
            tenant = self._tenant(user, context)
            most = 1 if user.fit_context else user.sampling.max_tokens  # how many fit is known once it is tokenised
            self.turnstile.check(
                tokens=most, most=most, tenant=tenant, priority=user.priority, left_s=context.time_remaining()
            )  # fmt: skip
            request = await admit(
                user,
                tokenizer=self._tokenizer,
                workers=self.fleet.views(),
                model=self.config.model,
                deadline_s=context.time_remaining(),
            )
        except PdspecError as error:
            self.metrics.watch(began).failed(error)
            raise
        REQUEST_ID.set(request.request_id)
        sampling = request.sampling
        text = AnswerText(
            self._tokenizer.stream(), stop_strings=sampling.stop_strings, min_tokens=sampling.min_tokens
        )
        handoff = Handoff(user.handoff or self.config.handoff)
        answer = Answer(
            request, fleet=self.fleet, text=text, config=self.config, handoff=handoff,
            token_bytes=self._tokenizer.token_bytes, resumed=user.resume_ids,
            prefixes=self._prefixes,
            on_placed=lambda estimate: self.metrics.placed.labels(estimate.choice).inc(),
        )  # fmt: skip
        try:
            async with aclosing(self._live.watched(request, began, self._placed(answer, request, tenant, asked_at))) \
                    as chunks:  # fmt: skip
                async for chunk in chunks:
                    yield chunk
        except Quarantined:
            self._quarantine.add(request.request_id)
            raise

    async def _placed(
        self, answer: Answer, request: GenerateRequest, tenant: str, asked_at: float
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """The answer's chunks, once there is a place for it."""
        async with self.turnstile.entered(request, tenant, asked_at) as place, aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                place.chunk(len(chunk.token_ids) // ID_BYTES)
                yield chunk

    def _tenant(self, user: UserRequest, context: grpc.aio.ServicerContext) -> str:
        """Whose share it is: where users show tokens the token's, else whoever the request says, else the host's."""
        caller = caller_of(tuple(context.invocation_metadata() or ()), context.peer())
        return caller if self.config.token_file else user.tenant or caller

    async def ListWorkers(
        self, message: pb.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListWorkersResponse:
        """Every worker of the fleet, with the reason of those that get no requests."""
        workers = [_view_to_pb(view) for view in self.fleet.views()]
        return pb.ListWorkersResponse(workers=workers, handoff=self.config.handoff, requests=self._live.to_pb())

    def _count_workers(self) -> Counter[tuple[str, str]]:
        return Counter((view.role, view.state.value) for view in self.fleet.views())

    def set_workers(self, *, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Route to these addresses from now on. On the event loop only."""
        self.fleet.set_workers(prefill=prefill, decode=decode)
        self._report_health()  # who has none left hears no heartbeat that would

    async def watch_health(self, servicer: health.aio.HealthServicer) -> None:
        """Keep the Router's health: SERVING while a decode worker is ready."""
        self._health = servicer
        self._report_health()

    def _changed(self) -> None:
        self._report_health()
        self.turnstile.poke()

    def _report_health(self) -> None:
        ready = any(view.role == "decode" and view.state is WorkerState.READY for view in self.fleet.views())
        if self._health is None or ready == self._serving:
            return
        self._serving = ready
        states = health_pb2.HealthCheckResponse
        task = asyncio.ensure_future(self._health.set(ROUTER, states.SERVING if ready else states.NOT_SERVING))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class RouterThread(ServiceThread[RouterService]):
    """The router on a thread of this process."""

    def set_workers(self, *, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Route to these addresses from now on; from any thread."""
        self.call(self.service.set_workers, prefill=tuple(prefill), decode=tuple(decode))


@asynccontextmanager
async def serving(config: RouterConfig, tokenizer: RouterTokenizer | None = None) -> AsyncIterator[RouterService]:
    """Serve while the block runs; ``tokenizer`` None loads that of ``config.model``. Raises ConfigError and
    CheckpointError before serving."""
    if tokenizer is None:
        loaded: RouterTokenizer = await asyncio.to_thread(load_tokenizer, config.model, config.cache_dir or None)
    else:
        loaded = tokenizer
    limit = config.max_message_bytes
    # Above its own limit the transport answers without a reason that names the field, so it is set well beyond ours.
    trust = Trust.of(config)
    gate = Gate(trust, members=False, rate=config.client_rate, request_timeout_s=config.request_timeout_s)
    server = make_server(max_message_bytes=2 * limit + (1 << 20), max_request_bytes=limit, gate=gate)
    service = RouterService(config, loaded, trust)
    rpc.add_RouterServicer_to_server(service, server)
    servicer = await add_health(server, (ROUTER,))
    service.address = bind(server, config.host, config.port, trust.server_credentials(members=False))
    with exposed(service.metrics, host=config.host, port=config.metrics_port):
        await server.start()
        try:
            service.set_workers(prefill=config.prefill, decode=config.decode)
            await service.watch_health(servicer)
            yield service
        finally:
            await servicer.enter_graceful_shutdown()
            await server.stop(service.grace_s)
            await service.fleet.close()
            if service.tracer:
                service.tracer.close()


def launch(config: RouterConfig) -> RouterThread:
    """Start the router on a thread of this process. Raises what ``serving`` raises."""
    return RouterThread(lambda: serving(config), name="router")


def _view_to_pb(view: WorkerView) -> pb.WorkerStatus:
    status = worker_info_to_pb(view.info) if view.info else pb.WorkerStatus()
    status.address, status.role = view.address, view.role
    status.state, status.reason, status.pending = view.state.value, view.reason, view.pending
    return status
