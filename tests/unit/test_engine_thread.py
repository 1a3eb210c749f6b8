"""The engine thread: commands between steps, in order; a step that raises ends it, and everyone who waits is told."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from pdspec.engine.thread import EngineThread, tell
from pdspec.errors import PeerLost


class FakeHost:
    """Steps ``work`` times, then is idle."""

    def __init__(self) -> None:
        self.work, self.steps, self.checks, self.closed = 0, 0, 0, False
        self.thread = threading.current_thread()
        self.bug: Exception | None = None

    def step(self) -> bool:
        assert threading.current_thread() is self.thread
        if self.bug:
            raise self.bug
        self.steps += self.work > 0
        self.work = max(0, self.work - 1)
        return self.work > 0

    def check_integrity(self) -> None:
        self.checks += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine():
    engine = EngineThread(FakeHost, name="engine-under-test")
    engine.start()
    yield engine
    engine.stop()
    assert not engine.alive() and engine.host.closed


def test_commands_run_on_the_engine_thread_in_their_order(engine):
    order: list[int] = []
    futures = [engine.post(lambda i=i: (order.append(i), threading.current_thread())[1]) for i in range(20)]
    assert {future.result(5) for future in futures} == {engine.host.thread}
    assert order == list(range(20)) and engine.host.thread is not threading.current_thread()


def test_work_is_done_to_its_end_and_the_books_are_checked_when_idle(engine):
    engine.post(lambda: setattr(engine.host, "work", 5)).result(5)
    deadline = time.monotonic() + 5
    while engine.host.checks == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.host.steps == 5 and engine.host.checks >= 1


def test_a_command_that_raises_tells_its_caller_and_nobody_else(engine):
    def bad() -> None:
        raise KeyError("mine")

    future = engine.post(bad)
    with pytest.raises(KeyError, match="mine"):
        future.result(5)
    assert engine.post(lambda: 7).result(5) == 7 and engine.alive()


def test_an_abandoned_wait_leaves_the_command(engine):
    """A coroutine that is cancelled while it waits must not take its command with it: what follows relies on it."""
    gate, ran = threading.Event(), threading.Event()
    engine.post(gate.wait)

    async def main() -> None:
        task = asyncio.ensure_future(engine.call(ran.set))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not ran.is_set()
    gate.set()
    assert ran.wait(5)


def test_a_step_that_raises_ends_the_thread_and_everyone_who_waits_hears_of_it():
    engine = EngineThread(FakeHost, name="engine-under-test")
    host = engine.start()
    gate = threading.Event()
    engine.post(gate.wait)
    host.bug = ZeroDivisionError("a bug")
    before = [engine.post(lambda: None) for _ in range(3)]
    gate.set()
    deadline = time.monotonic() + 5
    while engine.alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not engine.alive() and isinstance(engine.failure, ZeroDivisionError) and host.closed
    assert all(future.done() for future in before)
    with pytest.raises(PeerLost, match="has ended"):
        engine.post(lambda: None).result(5)
    engine.stop()


def test_a_host_that_cannot_be_made_raises_where_it_was_started():
    def broken() -> FakeHost:
        raise OSError("no such model")

    engine = EngineThread(broken, name="engine-under-test")
    with pytest.raises(OSError, match="no such model"):
        engine.start()
    assert not engine.alive()


def test_stop_is_idempotent_and_refuses_what_comes_after():
    engine = EngineThread(FakeHost, name="engine-under-test")
    engine.start()
    engine.stop()
    engine.stop()
    with pytest.raises(PeerLost):
        engine.post(lambda: 1).result(5)


def test_telling_a_loop_that_has_closed_is_no_error():
    loop = asyncio.new_event_loop()
    loop.close()
    tell(loop, lambda: None)
