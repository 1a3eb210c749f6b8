"""Tools of the tests that drive workers: more of them, channels, an engine held up, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest

from pdspec.config import WorkerConfig
from pdspec.engine.serving import RunningWorker
from pdspec.wire.channels import make_channel
from tests.parity.roles import TINY, Roles, wait_until


def check_clean(roles: Roles) -> None:
    """Whatever a test did: no page is held any more within a second, the books balance, both engines live."""
    assert wait_until(lambda: roles.held() == 0), f"{roles.held()} pages are still held"
    for worker in (roles.prefill, roles.decode):
        worker.engine.post(worker.engine.host.check_integrity).result(10)
        assert worker.alive()


@contextmanager
def worker(role: Any, **changes: Any) -> Iterator[RunningWorker]:
    """One more worker in this process; ``role`` is the package ``prefill_worker`` or ``decode_worker``."""
    started = role.service.launch(WorkerConfig(**{**TINY, **changes}))
    try:
        yield started
    finally:
        started.stop()


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    channel = make_channel(address)
    try:
        yield channel
    finally:
        await channel.close()


def status_of(roles: Roles, asked: Any, route: Any = None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        roles.ask(asked, route=route)
    return caught.value


@contextmanager
def held_up(worker: RunningWorker) -> Iterator[None]:
    """The engine is busy with one long step."""
    gate = threading.Event()
    worker.engine.post(lambda: gate.wait(10))
    try:
        yield
    finally:
        gate.set()


@contextmanager
def stopping(service: Any) -> Iterator[Any]:
    try:
        yield service
    finally:
        service.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)
