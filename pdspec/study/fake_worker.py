"""``python -m pdspec.study.fake_worker``: a decode worker that computes nothing: one chunk after the other, as fast as
they are taken, of one token each. What stands between it and a client is then all there is to measure.

Chunks are bytes on both sides of gRPC, so that this process costs little."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from pdspec.telemetry import setup_logging
from pdspec.types import FinishReason, GenerationStats, TokenChunk, WorkerInfo
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import bind, make_server, service_name
from pdspec.wire.codec import chunk_to_pb, worker_info_to_pb
from pdspec.wire.serving import run_in_foreground

_VOCABULARY, _KINDS = 250, 64


@dataclass
class FakeWorker(rpc.WorkerServicer):
    """Answers ``max_tokens`` tokens to whatever is asked."""

    address: str = ""

    async def Status(self, request: pb.StatusRequest, context: grpc.aio.ServicerContext) -> pb.WorkerStatus:
        """Always ready, and never full."""
        return worker_info_to_pb(
            WorkerInfo(
                worker_id="fake", role="decode", address=self.address, model="fake", fingerprint="f",
                drafters=("none",), free_pages=1 << 20, total_pages=1 << 20, page_size=16,
                max_context=1 << 20, vocab_size=_VOCABULARY,
            )
        )  # fmt: skip

    async def decode(self, data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Serialised chunks."""
        request = pb.DecodeRequest.FromString(data).request
        count = request.sampling.max_tokens
        ids = random.Random(count).choices(range(5, _VOCABULARY), k=_KINDS)
        for start in range(count - 1):
            yield pb.DecodeChunk(
                request_id=request.request_id, start=start, token_ids=ids[start % _KINDS].to_bytes(4, "little")
            ).SerializeToString()
        last = TokenChunk(
            request_id=request.request_id, start=count - 1, token_ids=(5,), finish_reason=FinishReason.LENGTH,
            stats=GenerationStats(output_tokens=count, verifications=max(1, count - 1), drafter="none"),
        )  # fmt: skip
        yield chunk_to_pb(last).SerializeToString()


@asynccontextmanager
async def serving() -> AsyncIterator[FakeWorker]:
    """Serve while the block runs."""
    server, worker = make_server(), FakeWorker()
    rpc.add_WorkerServicer_to_server(worker, server)
    handler = grpc.unary_stream_rpc_method_handler(worker.decode)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        service_name("DecodeWorker"), {"Decode": handler}
    ),))  # fmt: skip
    worker.address = bind(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield worker
    finally:
        await server.stop(0)


if __name__ == "__main__":
    setup_logging("warning")
    raise SystemExit(run_in_foreground(serving, "fake"))
