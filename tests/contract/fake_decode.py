"""A decode worker without a model: its ids are a function of the position alone, and it fails on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc

from pdspec.config import RouterConfig
from pdspec.errors import PdspecError
from pdspec.model.tokenizer import load_tokenizer
from pdspec.types import FinishReason, GenerateRequest, GenerationStats, Route, TokenChunk, WorkerInfo
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import bind, make_channel, make_server
from pdspec.wire.codec import chunk_to_pb, decode_request_from_pb, worker_info_to_pb
from router.service import RouterService, serving

TEXT = b"The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 4


@dataclass
class FakeDecode(rpc.DecodeWorkerServicer, rpc.WorkerServicer):
    """Token at absolute position n + t is byte t of TEXT, so that a replay continues. ``chunk`` tokens per message."""

    name: str = "d0"
    role: str = "decode"
    fingerprint: str = "f"
    chunk: int = 3
    pause_s: float = 0.0
    draining: bool = False
    max_context: int = 512
    fail_with: PdspecError | None = None  # before the first token
    die_after: int | None = None  # tokens after which the connection breaks
    hold_after: int | None = None  # tokens after which nothing comes any more
    lie: str = ""  # "gap", "cut", "garbage"
    requests: list[tuple[GenerateRequest, Route]] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    server: grpc.aio.Server | None = None
    address: str = ""
    dying: asyncio.Future | None = None

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        return worker_info_to_pb(
            WorkerInfo(
                worker_id=self.name, role=self.role, address=self.address, model="tiny", fingerprint=self.fingerprint,
                drafters=("none", "ngram"), running=self.running, free_pages=100, total_pages=100, page_size=16,
                max_context=self.max_context, vocab_size=300, draining=self.draining,
            )
        )  # fmt: skip

    async def Decode(
        self, message: pb.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeChunk]:
        request, route = decode_request_from_pb(message)
        self.requests.append((request, route))
        self.running += 1
        try:
            async for chunk in self._chunks(request, context):
                yield chunk
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _chunks(
        self, request: GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DecodeChunk]:
        if self.fail_with:
            raise self.fail_with
        sent, total = 0, request.sampling.max_tokens
        while sent < total:
            if self.die_after is not None and sent >= self.die_after:
                assert self.server
                self.dying = asyncio.ensure_future(self.server.stop(0))
                await asyncio.sleep(10)
            if self.hold_after is not None and sent >= self.hold_after:
                await asyncio.sleep(30)
            size = 1 if sent == 0 else min(self.chunk, total - sent)
            at = request.replayed + sent
            ids = tuple(byte_id(TEXT[at + index]) for index in range(size))
            last = sent + size == total
            stats = GenerationStats(
                output_tokens=total, verifications=(total - 1 + self.chunk - 1) // self.chunk, kv_bytes=7
            )
            if self.lie == "cut" and last:
                return
            start = sent + (1 if self.lie == "gap" and sent else 0)
            chunk = TokenChunk(
                request_id=request.request_id, start=start, token_ids=ids,
                finish_reason=FinishReason.LENGTH if last else None, stats=stats if last else None,
            )  # fmt: skip
            out = chunk_to_pb(chunk)
            if self.lie == "garbage" and sent:
                out.token_ids = b"123"
            yield out
            sent += size
            await asyncio.sleep(self.pause_s)


_TOKENIZER = load_tokenizer("tiny")
_IDS = {byte: _TOKENIZER.encode(chr(byte))[0] for byte in set(TEXT)}


def byte_id(byte: int) -> int:
    """The tiny model's token for one ASCII character."""
    return _IDS[byte]


@asynccontextmanager
async def decode_server(worker: FakeDecode, port: int = 0) -> AsyncIterator[str]:
    """Serve ``worker``; yields its address."""
    worker.server = make_server()
    rpc.add_DecodeWorkerServicer_to_server(worker, worker.server)
    rpc.add_WorkerServicer_to_server(worker, worker.server)
    worker.address = bind(worker.server, "127.0.0.1", port)
    await worker.server.start()
    try:
        yield worker.address
    finally:
        await worker.server.stop(0)


@dataclass
class Cluster:
    """A router over fakes, and a client's channel to it."""

    router: RouterService
    channel: grpc.aio.Channel

    @property
    def stub(self) -> rpc.RouterStub:
        return rpc.RouterStub(self.channel)


@asynccontextmanager
async def cluster(*workers: FakeDecode, prefill: tuple[str, ...] = (), **settings: object) -> AsyncIterator[Cluster]:
    """The router over ``workers``, each of which has answered one heartbeat."""
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(decode_server(worker)) for worker in workers]
        by_role = {role: tuple(w.address for w in workers if w.role == role) for role in ("prefill", "decode")}
        assert len(addresses) == len(workers)
        values = {"port": 0, "model": "tiny", "heartbeat_s": 0.1, "failover_wait_s": 0.3, **settings}
        values |= {"prefill": (*by_role["prefill"], *prefill), "decode": by_role["decode"]}
        router = await stack.enter_async_context(serving(RouterConfig(**values), _TOKENIZER))  # type: ignore[arg-type]
        await router.fleet.refresh()
        channel = make_channel(router.address)
        try:
            yield Cluster(router, channel)
        finally:
            await channel.close()
