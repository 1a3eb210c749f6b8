"""A worker's way out: who gets in, who is sent away, and what may be wished for."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from pdspec.config import ClusterConfig, WorkerConfig
from pdspec.engine.serving import WorkerService
from pdspec.errors import InvalidRequest, PdspecError, PeerLost
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.doors import Doors, Wish, wish_from_pb


def at_once(function) -> None:
    function()


def test_nobody_enters_once_the_doors_are_shut():
    doors, told = Doors(), []
    with doors.inside(told.append):
        assert len(doors) == 1 and not doors.shut
        doors.ask(Wish(role="prefill", deadline_s=1.0))
        with pytest.raises(PeerLost, match="draining"), doors.inside(told.append):
            raise AssertionError("let in")
        assert len(doors) == 1 and not told
    assert not len(doors) and doors.wish == Wish(role="prefill", deadline_s=1.0)


def test_a_drain_waits_for_those_inside_and_then_sends_them_away():
    doors, told, left = Doors(), list[PdspecError](), threading.Event()

    def call() -> None:
        def sent_away(error: PdspecError) -> None:
            told.append(error)
            left.set()

        with doors.inside(sent_away):
            left.wait(10)

    thread = threading.Thread(target=call)
    thread.start()
    while not len(doors):
        time.sleep(0.001)
    began = time.monotonic()
    assert doors.drain(at_once, 0.2, threading.Event()) == 1
    assert time.monotonic() - began >= 0.2
    thread.join(5)
    assert [type(error) for error in told] == [PeerLost] and not len(doors)


def test_a_drain_ends_with_the_last_call_and_when_somebody_is_in_a_hurry():
    doors, hurry = Doors(), threading.Event()
    began = time.monotonic()
    assert doors.drain(at_once, 60.0, hurry) == 0 and doors.shut
    doors = Doors()
    gone = threading.Event()
    thread = threading.Thread(target=_hold, args=(doors, gone))
    thread.start()
    while not len(doors):
        time.sleep(0.001)
    hurry.set()
    assert doors.drain(at_once, 60.0, hurry) == 1
    thread.join(5)
    assert time.monotonic() - began < 10


def _hold(doors: Doors, gone: threading.Event) -> None:
    with doors.inside(lambda _: gone.set()):
        gone.wait(10)


@pytest.mark.parametrize("message, wish", [
    (pb.DrainRequest(), Wish(role="", deadline_s=20.0)),
    (pb.DrainRequest(role="decode", deadline_s=0.0), Wish(role="decode", deadline_s=0.0)),
])  # fmt: skip
def test_wishes(message, wish):
    assert wish_from_pb(message, default_s=20.0) == wish


@pytest.mark.parametrize("message, field", [
    (pb.DrainRequest(role="router"), "role"), (pb.DrainRequest(deadline_s=-1.0), "deadline_s"),
    (pb.DrainRequest(deadline_s=float("nan")), "deadline_s"), (pb.DrainRequest(deadline_s=1e9), "deadline_s"),
])  # fmt: skip
def test_wishes_that_cannot_be_granted(message, field):
    with pytest.raises(InvalidRequest) as caught:
        wish_from_pb(message, default_s=1.0)
    assert caught.value.field == field


def test_ranks_keep_their_role_and_are_told_so_before_anything_is_shut():
    doors = Doors()
    service = WorkerService(lambda: None, doors, WorkerConfig(role="decode", tp=2))
    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(service.Drain(pb.DrainRequest(role="prefill"), None))
    assert caught.value.field == "role" and not doors.shut and doors.wish is None


@pytest.mark.parametrize("changes, roles", [
    ({}, {"prefill", "decode"}), ({"prefill_worker": {"tp": 2}}, {"decode"}),
    ({"worker": WorkerConfig(tp=2)}, {"decode"}),
])  # fmt: skip
def test_a_worker_has_both_roles_where_neither_has_ranks(changes, roles):
    found = ClusterConfig(decode_worker={"chunk": 64}, **changes).worker_roles("decode", 3)
    assert set(found) == roles and {one.worker_id for one in found.values()} == {"decode-3"}
    assert all(one.role == role and (one.chunk == 64) == (role == "decode") for role, one in found.items())
