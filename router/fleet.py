"""What the router knows of its workers: asked every heartbeat, counted in between.

A worker is lost when it refuses a heartbeat, leaves one unanswered, or has work and makes no step; the streams that
run on it are told (``Ticket.lost``), since a stopped process ends none of its connections. The next good answer heals.

All methods run on the router's event loop. ``views()`` is the snapshot that ``policy`` decides from.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import grpc

from pdspec.types import WorkerInfo
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_channel
from pdspec.wire.codec import worker_info_from_pb
from pdspec.wire.trust import OPEN, Metadata, Trust
from router.policy import WorkerState, WorkerView, reference_fingerprint

log = logging.getLogger(__name__)
LATE_S = 0.2  # a timeout that fires so much too late was slept through by this process, not by the worker


class Ticket:
    """One request that was sent to a worker, until ``close`` is called."""

    def __init__(self, worker: Worker, tokens: int = 0) -> None:
        self._worker, self.sent_at, self.tokens = worker, time.monotonic(), tokens
        self.lost: asyncio.Future[str] | None = None  # of ``watch``
        worker.open.add(self)

    def watch(self) -> asyncio.Future[str]:
        """Resolves with the reason when heartbeats find the worker lost."""
        if self.lost is None:
            self.lost = asyncio.get_running_loop().create_future()
        return self.lost

    def close(self) -> None:
        """The request ended there; a second call does nothing."""
        if self in self._worker.open:
            self._worker.open.remove(self)
            self._worker.ended.append((self.sent_at, time.monotonic()))
        if self.lost is not None:
            self.lost.cancel()


class Worker:
    """One address: its channel, the last report, and what happened since."""

    def __init__(
        self, address: str, role: str, *, lost_after_s: float, stall_s: float, trust: Trust = OPEN
    ) -> None:
        self.address, self.role, self._trust = address, role, trust
        self._lost_after_s, self._stall_s = lost_after_s, stall_s
        self.channel = make_channel(address, trust=trust)
        self.info: WorkerInfo | None = None
        self.asked_at = 0.0  # the last report's counts stand for this moment
        self.moved_at = 0.0  # when its step counter was last seen to move, or it had nothing to do
        self.reason = "has not answered yet"
        self.lost, self.leaving = False, False
        self.open: set[Ticket] = set()
        self.ended: list[tuple[float, float]] = []  # (sent, ended) of requests that ended since asked_at

    async def ask(self) -> None:
        """One heartbeat."""
        asked_at = time.monotonic()
        try:
            status = await rpc.WorkerStub(self.channel).Status(
                pb.StatusRequest(), timeout=self._lost_after_s, metadata=self._trust.metadata()
            )
        except grpc.RpcError as error:
            timed_out = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if not timed_out or time.monotonic() - asked_at < self._lost_after_s + LATE_S:
                self._missed(f"does not answer: {error.code().name}")
            return
        info = worker_info_from_pb(status)
        if info.role != self.role:
            log.warning("%s is a %s worker now, not a %s worker", self.address, info.role, self.role)
            self.role = info.role
        if not info.stepping or self.info is None or info.steps != self.info.steps:
            self.moved_at = asked_at
        self.ended = [(sent, end) for sent, end in self.ended if end >= asked_at]
        first, self.info, self.asked_at = self.info is None, info, asked_at
        if asked_at - self.moved_at > self._stall_s:
            self._missed(f"has {info.stepping} sequences and made no step for {self._stall_s:g} s")
            return
        if self.lost or first:
            log.info("%s worker %s (%s) answers", self.role, info.worker_id, self.address)
        self.lost, self.reason = False, ""

    def lose(self, reason: str) -> None:
        """A call on it failed as calls on dead workers do; the next heartbeat that it answers takes this back."""
        self.lost, self.reason = True, reason

    def view(self) -> WorkerView:
        """Fingerprints are compared by the fleet."""
        state, reason = WorkerState.READY, self.reason
        if self.leaving:
            state, reason = WorkerState.DRAINING, "was taken out of the fleet"
        elif self.lost:
            state = WorkerState.LOST
        elif self.info is None:
            state = WorkerState.UNKNOWN
        elif self.info.draining:
            state = WorkerState.DRAINING
        sent = [ticket.tokens for ticket in self.open if ticket.sent_at >= self.asked_at]
        ended_since = sum(sent < self.asked_at <= end for sent, end in self.ended)
        return WorkerView(
            address=self.address, role=self.role, state=state, reason=reason, info=self.info,
            pending=len(sent) - ended_since, pending_tokens=sum(sent),
        )  # fmt: skip

    def _missed(self, reason: str) -> None:
        if not self.lost:
            log.warning("%s worker %s is lost: it %s", self.role, self.address, reason)
        self.lost, self.reason = True, reason
        for ticket in self.open:
            if ticket.lost is not None and not ticket.lost.done():
                ticket.lost.set_result(reason)


class Fleet:
    """The workers of one deployment. ``start`` and ``close`` belong together; ``on_change`` is called after every
    heartbeat of any worker."""

    def __init__(
        self, *, heartbeat_s: float = 0.2, lost_after_s: float = 0.7, stall_s: float = 5.0,
        on_change: Callable[[], None] = lambda: None, trust: Trust = OPEN,
    ) -> None:  # fmt: skip
        self._heartbeat_s, self._on_change, self._trust = heartbeat_s, on_change, trust
        self._lost_after_s, self._stall_s = lost_after_s, stall_s
        self._workers: dict[str, Worker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.began = time.monotonic()  # a router that was started anew is told its workers a moment later
        self.stranded = 0  # answers that wait for any worker to come back

    def set_workers(self, *, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """These addresses from now on. New ones are asked at once; ones left out finish what they have."""
        wanted = {address: "prefill" for address in prefill} | {address: "decode" for address in decode}
        for address, role in wanted.items():
            worker = self._workers.get(address)
            if worker is not None and worker.role == role:
                worker.leaving = False
                continue
            if worker is not None:
                self._drop(address)
            self._workers[address] = Worker(
                address, role, lost_after_s=self._lost_after_s, stall_s=self._stall_s, trust=self._trust
            )
            self._tasks[address] = asyncio.ensure_future(self._watch(address))
        for address in self._workers.keys() - wanted.keys():
            self._workers[address].leaving = True

    def views(self) -> tuple[WorkerView, ...]:
        """A snapshot, in the order in which the workers were named."""
        views = tuple(worker.view() for worker in self._workers.values())
        fingerprint = reference_fingerprint(views)
        return tuple(_judge(view, fingerprint) for view in views)

    def channel(self, address: str) -> grpc.aio.Channel:
        """The open channel to a worker. Raises KeyError for an address that is not in the fleet."""
        return self._workers[address].channel

    def metadata(self) -> Metadata:
        """Of every call on a worker."""
        return self._trust.metadata()

    def send(self, address: str, tokens: int = 0) -> Ticket | None:
        """Count a request with a prompt of ``tokens`` as sent to ``address``; None when it has left the fleet."""
        worker = self._workers.get(address)
        return Ticket(worker, tokens) if worker else None

    def lose(self, address: str, reason: str) -> None:
        """Do not route to ``address`` until it answers a heartbeat again."""
        if worker := self._workers.get(address):
            worker.lose(reason)

    async def refresh(self) -> None:
        """Ask every worker once, now."""
        await asyncio.gather(*(worker.ask() for worker in self._workers.values()))
        self._on_change()

    async def close(self) -> None:
        """End the heartbeats and the channels."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for worker in self._workers.values():
            await worker.channel.close()

    async def _watch(self, address: str) -> None:
        worker = self._workers[address]
        while True:
            try:
                await worker.ask()
            except Exception:
                log.exception("heartbeat of %s", address)
                worker.lose("its status does not parse")
            self._on_change()
            if worker.leaving and not worker.open:
                del self._workers[address], self._tasks[address]
                await worker.channel.close()
                return
            await asyncio.sleep(self._heartbeat_s)

    def _drop(self, address: str) -> None:
        self._tasks.pop(address).cancel()
        worker = self._workers.pop(address)
        self._tasks[f"close {address} {id(worker)}"] = asyncio.ensure_future(worker.channel.close())


def _judge(view: WorkerView, fingerprint: str) -> WorkerView:
    if view.state is not WorkerState.READY or view.info is None or view.info.fingerprint == fingerprint:
        return view
    reason = f"fingerprint {view.info.fingerprint[:12]} differs from {fingerprint[:12]} of the decode workers; "
    reason += "start it with the same model, dtype and numerics"
    return dataclasses.replace(view, state=WorkerState.REFUSED, reason=reason)
