"""One prefill and one decode worker in this process, over real sockets: what looks into a handoff from both ends.

    with Pair(WorkerConfig(model="tiny")) as pair:
        answers = pair.ask(requests)
        pair.on_engine(pair.decode, lambda: …)      between two steps, on the worker's engine thread

The workers are those that ``python -m prefill_worker`` and ``python -m decode_worker`` start, frames and all; only
processes are saved, so that their engines can be watched, or broken on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

import decode_worker.service
import prefill_worker.service
from pdspec.config import WorkerConfig
from pdspec.engine.serving import RunningWorker
from pdspec.types import DraftTrace, GenerateRequest, GenerationStats, Route, TokenChunk
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import USER_MESSAGE_BYTES, size_options
from pdspec.wire.codec import chunk_from_pb, decode_request_to_pb
from pdspec.wire.status import from_rpc_error

T = TypeVar("T")
CONCURRENT = 8
_TIMEOUT_S = 900.0  # of one answer: prompts of others stand before it


@dataclass(frozen=True, kw_only=True)
class Traced:
    """An answer with the draft of each verification. ``stats``, which no two runs share, do not count in a
    comparison."""

    tokens: tuple[int, ...]
    traces: tuple[DraftTrace, ...]
    stats: GenerationStats | None = field(default=None, compare=False)

    @classmethod
    def of(cls, chunks: Sequence[TokenChunk]) -> Traced:
        """Of an answer's chunks, in order."""
        return cls(
            tokens=tuple(token for chunk in chunks for token in chunk.token_ids),
            traces=tuple(chunk.trace for chunk in chunks if chunk.trace),
            stats=next((chunk.stats for chunk in reversed(chunks) if chunk.stats), None),
        )

    @classmethod
    def batch(cls, chunks: Iterable[tuple[int, TokenChunk]], count: int) -> list[Traced]:
        """Of ``count`` answers that are written together: (index, chunk), each answer's in order."""
        own: list[list[TokenChunk]] = [[] for _ in range(count)]
        for index, chunk in chunks:
            own[index].append(chunk)
        return [cls.of(one) for one in own]


class Pair:
    """``prefill_changes`` and ``decode_changes`` are config keys of one role. Raises ConfigError."""

    def __init__(
        self, worker: WorkerConfig, *, prefill_changes: dict[str, Any] | None = None,
        decode_changes: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        worker = worker.replace(port=0)
        self.prefill: RunningWorker = prefill_worker.service.launch(worker.replace(**(prefill_changes or {})))
        try:
            self.decode: RunningWorker = decode_worker.service.launch(worker.replace(**(decode_changes or {})))
        except BaseException:
            self.prefill.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.decode.stop()
        self.prefill.stop()

    def ask(self, requests: Sequence[GenerateRequest], *, concurrent: int = CONCURRENT) -> list[Traced]:
        """The answers behind the handoff, ``concurrent`` at a time. Raises the PdspecError that a worker sent."""
        route = Route(decode=self.decode.address, prefill=(self.prefill.address,))
        with grpc.insecure_channel(self.decode.address, options=size_options(USER_MESSAGE_BYTES)) as channel:
            stub = rpc.DecodeWorkerStub(channel)

            def one(request: GenerateRequest) -> Traced:
                call = stub.Decode(decode_request_to_pb(request, route), timeout=_TIMEOUT_S)
                try:
                    return Traced.of([chunk_from_pb(message) for message in call])
                except grpc.RpcError as error:
                    raise from_rpc_error(error) from error
                finally:
                    call.cancel()

            with ThreadPoolExecutor(concurrent) as pool:
                return list(pool.map(one, requests))

    @staticmethod
    def on_engine(worker: RunningWorker, command: Callable[[], T]) -> T:
        """``command()`` between two steps of a worker, on its engine thread."""
        return worker.engine.post(command).result(_TIMEOUT_S)
