"""The asynchronous client of ``pdspec.v1.Router``: what the HTTP front and asyncio programs call.

    async with AsyncRouterClient("127.0.0.1:50051") as client:
        async with aclosing(client.stream(UserRequest(text="Once upon a time"))) as pieces:
            async for piece in pieces:
                print(piece.text, end="")

As with the blocking client, a router that dies under an answer and comes back is asked for the rest of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdspec.client import Access, Answer, Collected, explained, worker_map
from pdspec.resumption import RECONNECT_S, Piece, Resumption
from pdspec.types import UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_async_client_channel, service_name
from pdspec.wire.trust import bearer


class AsyncRouterClient:
    """One channel to a router, for any number of calls at once on one event loop. Close it, or use it in ``async
    with``. ``access`` says what a router with TLS or tokens is shown; ``token`` of a call stands in for its token.
    Raises ConfigError for files that cannot be read."""

    def __init__(self, endpoint: str, access: Access | None = None, *, reconnect_s: float = RECONNECT_S) -> None:
        self.endpoint, self._access, self.reconnect_s = endpoint, access or Access(), reconnect_s
        self.reconnects = 0  # streams taken up again
        self._answered = False
        self._channel = make_async_client_channel(endpoint, self._access.trust())
        self._stub = rpc.RouterStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def stream(
        self, request: UserRequest, *, timeout_s: float | None = None, token: str | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The answer as it comes. Closing the iterator (``contextlib.aclosing``) cancels the request on every hop.
        Raises the PdspecError that the cluster sent, PeerLost when there is no router."""
        progress = Resumption(request, timeout_s=timeout_s, reconnect_s=self.reconnect_s, answered=self._answered)
        while True:
            call = self._stub.Generate(progress.message(), timeout=progress.left_s(), metadata=self._shown(token))
            try:
                async for message in call:
                    piece = progress.took(message)
                    self._answered = True
                    yield piece
                    if piece.chunk.finish_reason is not None:
                        return
                return
            except grpc.RpcError as error:
                if (pause := progress.pause_s(error)) is None:
                    raise explained(error, self.endpoint) from error
            finally:
                call.cancel()
            self.reconnects += 1
            await asyncio.sleep(pause)

    async def generate(
        self, request: UserRequest, *, timeout_s: float | None = None, token: str | None = None
    ) -> Answer:
        """The whole answer. Raises as ``stream``."""
        collected = Collected()
        async with aclosing(self.stream(request, timeout_s=timeout_s, token=token)) as pieces:
            async for piece in pieces:
                collected.add(piece)
        return collected.answer()

    async def workers(self, *, timeout_s: float = 5.0, token: str | None = None) -> list[dict[str, Any]]:
        """What the router knows of each worker (``WorkerStatus`` of the proto as a map)."""
        try:
            found = await self._stub.ListWorkers(
                pb.ListWorkersRequest(), timeout=timeout_s, metadata=self._shown(token)
            )
        except grpc.RpcError as error:
            raise explained(error, self.endpoint) from error
        self._answered = True
        return [worker_map(worker) for worker in found.workers]

    async def healthy(self, *, timeout_s: float = 2.0) -> bool:
        """Whether the router answers and has a decode worker that is ready. Needs no token."""
        asked = health_pb2.HealthCheckRequest(service=service_name("Router"))
        try:
            found = await self._health.Check(asked, timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """End the channel and every call on it."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def _shown(self, token: str | None) -> tuple[tuple[str, str], ...]:
        return bearer(self._access.token if token is None else token)
