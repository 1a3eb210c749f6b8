"""``DecodeWorker/Decode``: one answer from its reservation to its last token.

reserve ─▶ room ─▶ Prefill call ─▶ First ─▶ (client) … Done ─▶ join ─▶ one chunk per verification ─▶ (client)
whatever ends the stream → landing stops → Release(answer) on the engine thread → pages free
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc

from decode_worker.answer import Answer
from decode_worker.host import DecodeHost
from decode_worker.links import Links
from decode_worker.metrics import metrics_of, totals
from decode_worker.run import COUNTED, Run
from pdspec.config import WorkerConfig
from pdspec.engine.local import checked
from pdspec.engine.serving import RunningWorker, WorkerService, describe
from pdspec.engine.thread import EngineThread
from pdspec.errors import DeadlineExceeded
from pdspec.parallel.ranks import RankProcess, StartRank
from pdspec.telemetry import REQUEST_ID
from pdspec.tracing import tracer_of
from pdspec.transfer.segment import sweep
from pdspec.transfer.shm_stream import Offers
from pdspec.types import (
    Route,
    TokenChunk,
    WorkerInfo,
)
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_channel
from pdspec.wire.codec import chunk_to_pb, decode_request_from_pb
from pdspec.wire.doors import Doors
from pdspec.wire.trust import Trust

log = logging.getLogger(__name__)


class DecodeService(rpc.DecodeWorkerServicer):
    """Serves streams on the asyncio thread."""

    def __init__(self, config: WorkerConfig, engine: EngineThread, host: DecodeHost) -> None:
        self.config, self.engine, self.host = config, engine, host
        self.worker_id, self.address = config.worker_id, ""
        self._epochs = itertools.count(secrets.randbits(40))
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.trust, self.doors = Trust.of(config), Doors()
        self.metrics, self.tracer = metrics_of(host), tracer_of(config.traces, "decode")
        self.offers = Offers(config.mover)
        self.links = Links()
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))

    async def Decode(
        self, request: pb.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeChunk]:
        """Stream one answer."""
        asked, route = decode_request_from_pb(request)
        REQUEST_ID.set(asked.request_id)
        await checked(self.host.resources, asked)
        answer = self.host.new_answer(asked, asyncio.get_running_loop())
        with self.doors.inside(answer.queue.put_nowait):
            async with aclosing(self._chunks(answer, route)) as chunks:
                async for chunk in chunks:
                    yield chunk_to_pb(chunk)

    async def _chunks(self, answer: Answer, route: Route) -> AsyncGenerator[TokenChunk, None]:
        loop, request = asyncio.get_running_loop(), answer.request
        deadline = None if request.deadline_s is None else loop.time() + request.deadline_s
        run = Run(self, answer, route)
        filling = asyncio.ensure_future(run.fill())
        # After landing has stopped, whatever cancels this coroutine meanwhile.
        filling.add_done_callback(lambda _: run.end())
        try:
            while True:
                # No timeout may stand around a yield: it would cancel whoever writes the chunk.
                if answer.queue.empty():
                    async with asyncio.timeout_at(deadline):
                        result = await answer.queue.get()
                else:
                    result = answer.queue.get_nowait()
                    if deadline is not None and loop.time() > deadline:
                        raise TimeoutError
                if isinstance(result, BaseException):
                    raise result
                if answer.took():  # perhaps nobody else steps
                    self.engine.post(lambda: None)
                run.moments.chunk()
                yield run.complete(result) if result.finish_reason else result
                if result.finish_reason:
                    return
        except TimeoutError:
            raise DeadlineExceeded(f"{request.deadline_s} s are over", field="deadline") from None
        finally:
            run.leave()
            filling.cancel()

    def channel(self, address: str) -> grpc.aio.Channel:
        """One channel per peer, kept."""
        if address not in self._channels:
            self._channels[address] = make_channel(address, trust=self.trust)
        return self._channels[address]

    def next_epoch(self) -> int:
        """Of a new reservation's stream."""
        return next(self._epochs)

    def info(self) -> WorkerInfo:
        """Status."""
        scheduler, decode = self.host.scheduler, self.host.decode
        info = describe(
            self.host.resources,
            worker_id=self.worker_id,
            role="decode",
            address=self.address,
            queued=len(scheduler.waiting) + len(self.host.prefixes.claims),
            running=len(scheduler.granted) + len(scheduler.running) + len(scheduler.retracted),
            steps=decode.steps + self.host.prefill.steps,
            stepping=self.host.stepping + len(self.host.prompts),
            unreachable=self.links.down(),
            seats=scheduler.max_batch,
            overcommit=scheduler.overcommit,
        )
        clocks = {f"{name}_seconds": seconds for name, seconds in list(decode.clocks.items())}
        own = {**self.counts, **totals(self.host, self.metrics), **self.offers.counts, **self.host.prefixes.counts()}
        figures = {**self.host.figures(), **self.links.figures()}
        return dataclasses.replace(info, metrics={**info.metrics, **clocks, **own, **figures})


def launch(config: WorkerConfig, start: StartRank = RankProcess) -> RunningWorker:
    """Start a decode worker in this process; ``start`` starts its other ranks. Raises ConfigError."""
    config = config.replace(role="decode")
    sweep()
    engine = EngineThread(lambda: DecodeHost(config, start), name="engine")
    host = engine.start()
    service = DecodeService(config, engine, host)  # type: ignore[arg-type]

    def register(server: grpc.aio.Server, address: str) -> None:
        service.address = address
        service.worker_id = config.worker_id or f"decode@{address}"
        rpc.add_DecodeWorkerServicer_to_server(service, server)
        rpc.add_WorkerServicer_to_server(WorkerService(service.info, service.doors, config), server)

    return RunningWorker(config, engine, ("DecodeWorker",), register, service.metrics, service.tracer, service)
