"""Two roles in one process over real sockets: what the parity and fault tests drive."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import decode_worker.service
import prefill_worker.service
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.engine.serving import RunningWorker
from pdspec.spec.registry import NAMES
from pdspec.types import DraftTrace, GenerateRequest, GenerationStats, Route, SamplingParams, TokenLogprob
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_channel
from pdspec.wire.codec import chunk_from_pb, decode_request_to_pb

T = TypeVar("T")
TINY: dict[str, Any] = {
    "model": "tiny", "drafters": ("none", "ngram", "suffix", "eagle3"),
    "heads": {"eagle3": "random:0"}, "cache_tokens": 8192, "threads": 1, "chunk": 16,
    "poison": True, "prefix_cache": "off",  # handoffs are whole, whatever was asked before
}  # fmt: skip
# Every family that can be made for the tiny model. The draft model is the target itself: much is accepted, and where
# penalties move the target away from it much is not. The sparse view has about half of a prompt.
EAGLES = ("eagle1", "eagle2", "eagle3")
READS_HIDDEN = ("medusa", *EAGLES, "mtp", "combined")
LEARNED = (*READS_HIDDEN, "draft_model", "sparse")
EVERY: dict[str, Any] = {
    "drafters": NAMES,
    "heads": {**dict.fromkeys(READS_HIDDEN, "random:0"), "draft_model": "tiny"},
    "options": {"sparse:sink": "2", "sparse:window": "12", "mtp:modules": "3"},
}
WITH_MEMORY = ("suffix", "combined")  # draft by what the worker served before: the same only in the same order


# One event loop for every client of a test run: gRPC's poller is shared by all loops of a process, and one that was
# closed with calls still ending holds up the others.
_LOOP = asyncio.new_event_loop()
threading.Thread(target=_LOOP.run_forever, name="test-clients", daemon=True).start()


def run_client(work: Coroutine[Any, Any, T]) -> T:
    """Run a client's coroutine to its end."""
    return asyncio.run_coroutine_threadsafe(work, _LOOP).result()


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    traces: list[DraftTrace] = field(default_factory=list)
    stats: GenerationStats | None = None


def take(answer: Answer, chunk) -> None:
    assert chunk.start == len(answer.tokens)
    answer.tokens += chunk.token_ids
    answer.logprobs += chunk.logprobs
    answer.traces += [chunk.trace] if chunk.trace else []
    answer.stats = chunk.stats or answer.stats


@dataclass
class Roles:
    prefill: RunningWorker
    decode: RunningWorker
    local: LocalGenerator

    def route(self, *prefill: str, **changes: Any) -> Route:
        return Route(decode=self.decode.address, prefill=prefill or (self.prefill.address,), **changes)

    def ask_local(self, request: GenerateRequest) -> Answer:
        answer = Answer()
        for chunk in self.local.generate(request):
            take(answer, chunk)
        return answer

    def ask(self, *requests: GenerateRequest, route: Route | None = None) -> list[Answer]:
        """All at once, through the decode worker."""
        return run_client(self._ask(requests, route or self.route()))

    async def _ask(self, requests, route) -> list[Answer]:
        channel = make_channel(self.decode.address)
        try:
            return list(await asyncio.gather(*(self.one(channel, request, route) for request in requests)))
        finally:
            await channel.close()

    @staticmethod
    async def one(channel, request: GenerateRequest, route: Route, stop_after: int = 10**9) -> Answer:
        answer, call = Answer(), rpc.DecodeWorkerStub(channel).Decode(decode_request_to_pb(request, route))
        try:
            async for message in call:
                take(answer, chunk_from_pb(message))
                if len(answer.tokens) >= stop_after:
                    break
        finally:
            call.cancel()
        return answer

    def held(self) -> int:
        """Pages held on both workers, asked of the engine threads."""
        return sum(held_by(worker) for worker in (self.prefill, self.decode))


def held_by(worker: RunningWorker) -> int:
    host = worker.engine.host
    return worker.engine.post(lambda: host.resources.pool.held).result(10)


def wait_until(condition, seconds: float = 1.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())


@contextmanager
def running(
    prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **common: Any
) -> Iterator[Roles]:
    """Both workers and the local reference; teardown checks that no page is held and both engines are alive."""
    base = {**TINY, **common}
    p = prefill_worker.service.launch(WorkerConfig(**{**base, **(prefill or {})}))
    d = decode_worker.service.launch(WorkerConfig(**{**base, **(decode or {}), "role": "decode"}))
    roles = Roles(p, d, LocalGenerator(WorkerConfig(**base)))
    try:
        yield roles
        assert wait_until(lambda: roles.held() == 0, 2.0), f"{roles.held()} pages leaked"
        for worker in (p, d):
            worker.engine.post(worker.engine.host.check_integrity).result(10)
            assert worker.alive()
        roles.local.resources.pool.check_integrity([])
    finally:
        p.stop()
        d.stop()
        roles.local.resources.close()


def request(drafter: str = "eagle3", tree: str = "", *, n: int = 45, seed: int = 3, **changes: Any) -> GenerateRequest:
    """A prompt of ``n`` tokens that depends on ``seed``."""
    sampling = SamplingParams(**{"seed": seed, "max_tokens": 40, "ignore_eos": True, **changes.pop("sampling", {})})
    ids = tuple((7 * i * i + 11 * seed + i) % 256 for i in range(n))
    return GenerateRequest(
        request_id=f"r{seed}", prompt_ids=ids, drafter=drafter, tree=tree, sampling=sampling, trace=True, **changes
    )
