"""Many requests to one router from one thread: when each piece of each answer came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from pdspec.errors import PeerLost
from pdspec.types import GenerationStats, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.channels import make_channel
from pdspec.wire.codec import stats_from_pb, user_request_to_pb
from pdspec.wire.ids import bytes_to_ids
from pdspec.wire.status import from_rpc_error


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An answer. ``asked`` and ``times``, of its pieces, are ``time.perf_counter`` readings."""

    token_ids: tuple[int, ...]
    asked: float
    times: tuple[float, ...]
    stats: GenerationStats | None  # None where the answer was left before its end

    @property
    def complete(self) -> bool:
        """Whether the last message came."""
        return self.stats is not None

    @property
    def ttft_s(self) -> float:
        """From the request to the first token."""
        return self.times[0] - self.asked

    @property
    def done_s(self) -> float:
        """From the request to the last token."""
        return self.times[-1] - self.asked


class Load:
    """A client of ``endpoint`` with an event loop of its own."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self._loop = endpoint, asyncio.new_event_loop()
        self._channel = self._loop.run_until_complete(self._open())

    async def _open(self) -> grpc.aio.Channel:
        return make_channel(self.endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._channel.close())
        self._loop.close()

    def run(
        self, requests: Sequence[UserRequest], starts: Sequence[float] | None = None, *, until: int = 0
    ) -> list[Timed]:
        """Ask each request ``starts`` seconds from now (default: all at once) and wait for all; the first ``until`` of
        them are left as soon as the others are done. Raises the first error, what is left is cancelled then."""
        delays = starts or [0.0] * len(requests)
        return self._loop.run_until_complete(self._all(requests, delays, until))

    async def _all(self, requests: Sequence[UserRequest], delays: Sequence[float], until: int) -> list[Timed]:
        began, over = self._loop.time(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._ask(user_request_to_pb(request), began + delay, over if at < until else None))
                for at, (request, delay) in enumerate(zip(requests, delays, strict=True))
            ]
            await asyncio.gather(*tasks[until:])
            over.set()
        return [task.result() for task in tasks]

    async def _ask(self, message: pb.GenerateRequest, at: float, over: asyncio.Event | None) -> Timed:
        """``over`` ends the reading, with the next piece."""
        await asyncio.sleep(max(0.0, at - self._loop.time()))
        asked, times, parts, last = time.perf_counter(), list[float](), list[bytes](), None
        call = rpc.RouterStub(self._channel).Generate(message)
        try:
            async for chunk in call:
                times.append(time.perf_counter())
                parts.append(chunk.token_ids)
                last = chunk
                if over is not None and over.is_set():
                    break
        except grpc.RpcError as error:
            raise from_rpc_error(error, peer=self.endpoint) from error
        finally:
            call.cancel()
        left = over is not None and over.is_set()
        if last is None or not (last.finish_reason or left):
            raise PeerLost("an answer ended without its last message")
        return Timed(
            token_ids=bytes_to_ids(b"".join(parts), "token_ids"), asked=asked, times=tuple(times),
            stats=stats_from_pb(last.stats) if last.finish_reason else None,
        )  # fmt: skip
