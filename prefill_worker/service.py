"""``PrefillWorker/Prefill``: one stream per prompt, from Open to Done.

Open → checks → queue → Begin ─┬─ engine thread: step, step … ──events──┐
                               └─ this coroutine: read pages, send frames ◀┘ … Done
whatever ends the stream → Release(sequence) on the engine thread → pages free
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.config import WorkerConfig
from pdspec.engine.claims import entered
from pdspec.engine.local import checked, new_context
from pdspec.engine.resources import check_fingerprint
from pdspec.engine.serving import RunningWorker, WorkerService, describe
from pdspec.engine.thread import EngineThread, tell
from pdspec.errors import DeadlineExceeded, PdspecError
from pdspec.metrics import PrefillMetrics
from pdspec.parallel.ranks import RankProcess, StartRank
from pdspec.spec.protocol import Candidates
from pdspec.spec.protocol import HiddenRows as TargetRows
from pdspec.telemetry import REQUEST_ID, clock_name
from pdspec.tracing import tracer_of
from pdspec.transfer.faults import FrameFaults
from pdspec.transfer.frames import FRAME_BYTES, Begin, DraftStart, First, HiddenRows, Pages
from pdspec.transfer.grpc_serve import PrefillStream, prefill_handler
from pdspec.transfer.ledger import HIDDEN
from pdspec.transfer.lossy import BLOCK, encode
from pdspec.transfer.pace import Pace
from pdspec.transfer.segment import sweep
from pdspec.transfer.shm_serve import Lanes
from pdspec.types import CacheGroup, DraftPrefill, GenerateRequest, TokenLogprob, WorkerInfo
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.doors import Doors
from prefill_worker.host import PrefillHost, QueuedPrompt


class Events:
    """Carries what the engine says to the stream's coroutine, in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.queue: asyncio.Queue[tuple[str, tuple[Any, ...]]] = asyncio.Queue()
        self.rows_at = 0.0  # when the last layer so far was computed, on the monotonic clock

    def _tell(self, kind: str, *values: Any) -> None:
        tell(self._loop, self.queue.put_nowait, (kind, values))

    def rows(self, group: str, layer: int, start: int, stop: int) -> None:
        """See PrefillEvents."""
        self.rows_at = time.monotonic()
        self._tell("rows", group, layer, start, stop)

    def hidden(self, rows: TargetRows) -> None:
        """See PrefillEvents."""
        self._tell("hidden", rows)

    def first(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """See PrefillEvents."""
        self._tell("first", token_id, logprob)

    def start(self, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """See PrefillEvents."""
        self._tell("start", candidates, rows)

    def done(self) -> None:
        """See PrefillEvents."""
        self._tell("done")

    def failed(self, error: PdspecError) -> None:
        """See PrefillEvents."""
        self._tell("failed", error)


class PrefillService:
    """Serves streams on the asyncio thread."""

    def __init__(self, config: WorkerConfig, engine: EngineThread, host: PrefillHost) -> None:
        self.config, self.engine, self.host = config, engine, host
        self.worker_id, self.address = config.worker_id, ""
        self.tracer = tracer_of(config.traces, "prefill")
        scheduler, pool = host.scheduler, host.resources.pool
        self.metrics = PrefillMetrics(
            running=lambda: len(scheduler.running) + len(scheduler.held),
            waiting=lambda: len(scheduler.waiting),
            pool=lambda: (pool.held, pool.num_pages),
            prefix=host.prefixes.counts,
            wire_kv=config.wire_kv,
        )
        self.lanes, self.doors = Lanes(config.mover), Doors()

    async def serve(self, stream: PrefillStream) -> None:
        """One Prefill call. Raises typed errors, which the handler sends as ErrorFrame and status."""
        opening, resources = stream.open, self.host.resources
        REQUEST_ID.set(opening.request.request_id)
        request = dataclasses.replace(
            opening.request, drafter=opening.drafter, draft_prefill=opening.draft_prefill or DraftPrefill.PREFILL.value
        )
        check_fingerprint(
            resources.fingerprint,
            dict(opening.fingerprint),
            drafter=opening.drafter,
            peer=opening.worker_id or "the decode worker",
        )
        await checked(resources, request)
        events = Events(asyncio.get_running_loop())
        with self.doors.inside(events.failed):
            await self._prefill(stream, request, events)

    async def _prefill(self, stream: PrefillStream, request: GenerateRequest, events: Events) -> None:
        opening, resources = stream.open, self.host.resources
        prompt = self._prompt(request, opening.have_rows, events)
        try:
            await entered(self.engine, partial(self.host.enter, prompt))
            await stream.send(
                Begin(
                    epoch=opening.epoch,
                    rows=self._rows(prompt),
                    fingerprint=resources.fingerprint,
                    worker_id=self.worker_id,
                    clock=clock_name(),
                )
            )
            try:
                async with asyncio.timeout(request.deadline_s):  # in the queue, too
                    await self._send(stream, prompt, events)
            except TimeoutError:
                raise DeadlineExceeded("the request's time is over", field="deadline") from None
            self._count(stream, prompt)
        except PdspecError as error:
            self.metrics.lost.labels(type(error).__name__).inc()
            raise
        finally:
            prompt.abandoned = True
            self.engine.post(lambda: self.host.release(prompt))

    def _count(self, stream: PrefillStream, prompt: QueuedPrompt) -> None:
        metrics, moved = self.metrics, stream.ledger.moved
        metrics.prompt.inc(prompt.ctx.prompt_len)
        metrics.queue.observe(prompt.started_at - prompt.queued_at)
        metrics.prefill.observe(prompt.seconds)
        target = self.host.resources.runner.group.name
        drafts = sum(moved(group.name) for group in prompt.drafter.groups)
        if self.tracer:
            request_id, began = prompt.request.request_id, prompt.started_at
            self.tracer.span("prefill queue", request_id, prompt.queued_at, began)
            self.tracer.span("prefill compute", request_id, began, time.perf_counter(), tokens=prompt.ctx.prompt_len)
        metrics.transfer(kv=moved(target), draft=drafts, hidden=moved("hidden"))

    def _prompt(self, request: GenerateRequest, have: Mapping[str, int], events: Events) -> QueuedPrompt:
        ctx = new_context(self.host.resources, request, [])
        drafter = self.host.resources.drafter(request.drafter)
        rows = len(request.prompt_ids) + 1 + drafter.max_nodes
        here = request.draft_prefill == DraftPrefill.PREFILL.value
        hidden = not here and request.sampling.max_tokens > 1 and bool(drafter.capture or drafter.want_final)
        known = have.get(HIDDEN, 0) if hidden else None  # the hidden rows behind must be computed
        return QueuedPrompt(
            request=request,
            ctx=ctx,
            drafter=drafter,
            draft_prefill=DraftPrefill(request.draft_prefill),
            events=events,
            ship_rows=request.sampling.max_tokens > 1,
            queued_at=time.perf_counter(),
            prefix=self.host.prefixes.begin(request, drafter, drafts=here),
            limit=known,
            hidden_from=known or 0,
            num_pages=pages_for(rows, self.host.resources.pool.page_size),
        )

    def _rows(self, prompt: QueuedPrompt) -> dict[str, int]:
        n = prompt.ctx.prompt_len if prompt.ship_rows else 0
        drafts = prompt.drafter.rows_at(n) if n and prompt.draft_prefill is DraftPrefill.PREFILL else {}
        return {self.host.resources.runner.group.name: n, **drafts}

    async def _send(self, stream: PrefillStream, prompt: QueuedPrompt, events: Events) -> None:
        resources, epoch = self.host.resources, stream.open.epoch
        cache, lossy, sending = resources.cache, self.config.lossy_wire, 0.0
        while True:
            if events.queue.empty():
                began = time.perf_counter()
                await stream.flush()
                sending += time.perf_counter() - began
            kind, values = await events.queue.get()
            began = time.perf_counter()
            match kind:
                case "rows":
                    for frame in page_frames(cache, prompt.ctx.pages, *values, have=stream.open.have_rows):
                        if lossy and frame.group == resources.runner.group.name:
                            frame = await asyncio.to_thread(rounded_frame, frame, resources.runner.group)
                        await stream.send(frame, more=True)
                case "hidden":
                    await stream.send(hidden_frame(epoch, values[0]), more=True)
                case "first":
                    await stream.send(First(epoch=epoch, token_id=values[0], logprob=values[1]))
                case "start":
                    await stream.send(start_frame(epoch, *values))
                case "failed":
                    raise values[0]
                case "done":
                    queue_ms = 1e3 * (prompt.started_at - prompt.queued_at)
                    stats = {"queue_ms": queue_ms, "prefill_ms": 1e3 * prompt.seconds}
                    stats["cached_tokens"] = float(prompt.prefix.start if prompt.prefix else 0)
                    await stream.finish({**stats, "sending_ms": 1e3 * sending, "computed_at_s": events.rows_at})
                    return
            sending += time.perf_counter() - began

    def info(self) -> WorkerInfo:
        """Status."""
        scheduler = self.host.scheduler
        info = describe(
            self.host.resources,
            worker_id=self.worker_id,
            role="prefill",
            address=self.address,
            queued=len(scheduler.waiting) + len(self.host.prefixes.claims),
            running=len(scheduler.running),
            steps=self.host.engine.steps,
            stepping=sum(not prompt.finished for prompt in list(scheduler.running)),
        )
        own = {**self.lanes.counts, **self.host.prefixes.counts(), **self.host.figures()}
        return dataclasses.replace(info, metrics={**info.metrics, **own})


def page_frames(
    cache: PagedCache, pages: Sequence[int], group: str, layer: int, start: int, stop: int, *, have: Mapping[str, int]
) -> Iterator[Pages]:
    """Rows ``start..stop-1`` of one layer in frames of a good size, without those that the decode worker has."""
    layout = cache.layout(group)
    most = max(1, FRAME_BYTES // layout.row_bytes)
    most -= most % BLOCK if most > BLOCK else 0  # blocks of ``lossy`` stay whole
    for first in range(max(start, have.get(group, 0)), stop, most):
        last = min(first + most, stop)
        yield Pages(
            epoch=0, seq=0, group=group, layer=layer, start=first, count=last - first, head_start=0,
            head_count=layout.num_kv_heads, payload=cache.row_views(group, layer, pages, first, last),
        )  # fmt: skip


def rounded_frame(frame: Pages, layout: CacheGroup) -> Pages:
    """The frame with its rows rounded to int8."""
    return dataclasses.replace(frame, payload=encode(frame.payload, layout, frame.start, frame.count))


def hidden_frame(epoch: int, rows: TargetRows) -> HiddenRows:
    """Captured layers, then the final state, each float32 [rows, ...]."""
    parts = [part for part in (rows.captured, rows.final) if part is not None]
    payload = tuple(part.contiguous().cpu().numpy().data for part in parts)
    return HiddenRows(epoch=epoch, seq=0, start=rows.start, count=len(parts[0]), dtype="float32", payload=payload)


def start_frame(epoch: int, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> DraftStart:
    """The drafter's start; no candidates travel as W = 0."""
    found = candidates or Candidates(
        token_ids=np.empty(0, np.int32), log_q=np.empty(0, np.float32), score=np.empty(0, np.float32)
    )
    return DraftStart(
        epoch=epoch,
        seq=0,
        token_ids=found.token_ids,
        log_q=found.log_q,
        score=found.score,
        rows={name: row.cpu().numpy() for name, row in rows.items()},
    )


def launch(config: WorkerConfig, start: StartRank = RankProcess) -> RunningWorker:
    """Start a prefill worker in this process; ``start`` starts its other ranks. Raises ConfigError."""
    config = config.replace(role="prefill")
    sweep()
    faults = FrameFaults(config.frame_faults) if config.frame_faults else None
    engine = EngineThread(lambda: PrefillHost(config, start), name="engine")
    host = engine.start()
    service = PrefillService(config, engine, host)  # type: ignore[arg-type]

    def register(server: grpc.aio.Server, address: str) -> None:
        service.address = address
        service.worker_id = config.worker_id or f"prefill@{address}"
        handler = prefill_handler(
            service.serve, steps=lambda: service.host.engine.steps, stall_timeout_s=config.stall_timeout_s,
            lanes=service.lanes, pace=Pace(config.link_limit), faults=faults,
        )  # fmt: skip
        server.add_generic_rpc_handlers((handler,))
        rpc.add_WorkerServicer_to_server(WorkerService(service.info, service.doors, config), server)

    return RunningWorker(config, engine, ("PrefillWorker",), register, service.metrics, service.tracer, service)
