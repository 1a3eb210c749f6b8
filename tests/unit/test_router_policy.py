"""Routing is a pure function: least load, fail-over order, and a clear text when nobody can."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from pdspec.errors import InvalidRequest, Overloaded, PeerLost
from pdspec.types import Handoff, Route, WorkerInfo
from router.fleet import Ticket, Worker
from router.policy import WorkerState, WorkerView, choose, reference_fingerprint
from router.prefixes import BLOCK, PrefixMap


def worker(
    address: str,
    role: str = "decode",
    *,
    running: int = 0,
    queued: int = 0,
    pending: int = 0,
    state: WorkerState = WorkerState.READY,
    free: int = 100,
    fingerprint: str = "f",
    drafters: tuple[str, ...] = ("none", "eagle3"),
) -> WorkerView:
    info = WorkerInfo(
        worker_id=address,
        role=role,
        address=address,
        model="m",
        fingerprint=fingerprint,
        drafters=drafters,
        queued=queued,
        running=running,
        free_pages=free,
        total_pages=100,
        page_size=16,
    )
    return WorkerView(address=address, role=role, state=state, info=info, pending=pending)


def route(*workers: WorkerView, **options: object) -> Route:
    return choose(workers, **{"handoff": Handoff.DIRECT, "tokens": 64, **options})  # type: ignore[arg-type]


def test_the_least_loaded_decode_worker_is_chosen() -> None:
    assert route(worker("a", running=2), worker("b", running=1, queued=2), worker("c", running=1)).decode == "c"


def test_requests_sent_but_not_reported_count() -> None:
    assert route(worker("a", running=1, pending=2), worker("b", running=2)).decode == "b"
    assert route(worker("a", running=3, pending=-3), worker("b", running=1)).decode == "a"


def test_a_worker_without_room_comes_last_while_it_is_busy() -> None:
    assert route(worker("a", running=1, free=1), worker("b", running=5)).decode == "b"
    assert route(worker("a", free=1), worker("b", running=5)).decode == "a"  # idle: its cache can be evicted


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.REFUSED, WorkerState.LOST, WorkerState.UNKNOWN])
def test_only_ready_decode_workers_are_chosen(state: WorkerState) -> None:
    assert route(worker("a", state=state), worker("b", running=9)).decode == "b"
    with pytest.raises(PeerLost, match=f"a {state.value}"):
        route(worker("a", state=state))


def test_nobody_at_all_says_so() -> None:
    with pytest.raises(PeerLost, match="none is configured"):
        route()


def test_excluded_workers_are_not_tried_again() -> None:
    assert route(worker("a"), worker("b", running=3), exclude=("a",)).decode == "b"
    with pytest.raises(PeerLost, match="failed this request"):
        route(worker("a"), exclude=("a",))


def test_prefill_workers_in_order_of_load_with_the_silent_last() -> None:
    fleet = (
        worker("lost", "prefill", state=WorkerState.LOST),
        worker("busy", "prefill", running=3),
        worker("drains", "prefill", state=WorkerState.DRAINING),
        worker("free", "prefill"),
        worker("other", "prefill", state=WorkerState.REFUSED),
    )
    assert route(worker("d"), *fleet).prefill == ("free", "busy", "lost")


def test_a_prefill_worker_without_the_drafter_comes_after_those_that_hold_it() -> None:
    lacks, holds = worker("x", "prefill", drafters=("none",)), worker("y", "prefill", running=3)
    assert route(worker("d"), lacks, holds, drafter="eagle3").prefill == ("y", "x")
    assert route(worker("d"), lacks, holds).prefill == ("x", "y")


def test_without_prefill_workers_the_decode_worker_prefills() -> None:
    assert route(worker("d")).prefill == ()


def test_refused_prefill_workers_are_no_reason_to_prefill_elsewhere_in_silence() -> None:
    with pytest.raises(PeerLost, match="p refused"):
        route(worker("d"), worker("p", "prefill", state=WorkerState.REFUSED))


def test_drafters_that_nobody_holds() -> None:
    assert route(worker("a", drafters=("none",)), worker("b", running=9), drafter="eagle3").decode == "b"
    with pytest.raises(PeerLost, match="medusa"):
        route(worker("a"), drafter="medusa")


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="1600"):
        route(worker("a"), tokens=1601)
    assert route(worker("a"), tokens=1600).decode == "a"


def test_overload_is_refused_before_any_work() -> None:
    with pytest.raises(Overloaded) as caught:
        route(worker("a", queued=3), worker("b", pending=4), max_waiting=3)
    assert caught.value.retry_after_ms > 0
    assert route(worker("a", queued=3), worker("b", pending=2), max_waiting=3).decode == "b"


def test_relay_needs_a_relay() -> None:
    assert route(worker("a"), handoff=Handoff.RELAY, relay="r:1").relay == "r:1"
    with pytest.raises(InvalidRequest, match="handoff"):
        route(worker("a"), handoff=Handoff.RELAY)


def test_the_reference_fingerprint_is_that_of_most_decode_workers() -> None:
    first, second = worker("a", fingerprint="x"), worker("b", fingerprint="y")
    prefill, lost = worker("p", "prefill", fingerprint="z"), worker("l", fingerprint="q", state=WorkerState.LOST)
    assert reference_fingerprint((lost, prefill, prefill, first, second)) == "x"
    assert reference_fingerprint((first, second, worker("c", fingerprint="y"))) == "y"
    assert reference_fingerprint((prefill,)) == "z"
    assert reference_fingerprint(()) == ""


def test_tickets_bridge_the_time_between_reports() -> None:
    async def run() -> None:
        one = Worker("127.0.0.1:1", "decode", lost_after_s=0.5, stall_s=5.0)
        before = Ticket(one)
        assert one.view().pending == 1  # sent, not reported
        time.sleep(0.01)
        one.asked_at = time.monotonic()  # a report that counts it
        assert one.view().pending == 0
        time.sleep(0.01)
        after = Ticket(one)
        assert one.view().pending == 1
        before.close()
        before.close()
        assert one.view().pending == 0  # one more than reported, one less
        after.close()
        assert one.view().pending == -1
        await one.channel.close()

    asyncio.run(run())


def cut_off(address: str, *links: str, **changes: object) -> WorkerView:
    view = worker(address, **changes)  # type: ignore[arg-type]
    assert view.info
    return dataclasses.replace(view, info=dataclasses.replace(view.info, unreachable=links))


def test_a_pair_that_cannot_reach_one_another_is_routed_around() -> None:
    prefill = [worker("p1", "prefill"), worker("p2", "prefill", running=3)]
    assert route(cut_off("a", "p1"), *prefill).prefill == ("p2", "p1")
    assert route(worker("a"), *prefill).prefill == ("p1", "p2")
    # Who reaches somebody is better than who reaches nobody, whatever the load.
    assert route(cut_off("a", "p1", "p2"), worker("b", running=5), *prefill).decode == "b"
    assert route(cut_off("a", "p1"), worker("b", running=5), *prefill).decode == "a"
    assert route(cut_off("a", "p1", "p2"), *prefill).decode == "a"  # the only one: perhaps it has healed


def test_links_through_a_relay_fail_apart_from_direct_ones() -> None:
    prefill = [worker("p1", "prefill"), worker("p2", "prefill", running=3)]
    decode = cut_off("a", "r>p1")
    assert route(decode, *prefill).prefill == ("p1", "p2")
    assert route(decode, *prefill, handoff=Handoff.RELAY, relay="r").prefill == ("p2", "p1")


def holding(view: WorkerView) -> WorkerView:
    assert view.info is not None
    return dataclasses.replace(view, info=dataclasses.replace(view.info, metrics={"prefix_cached_pages": 5.0}))


def test_a_cached_beginning_is_worth_some_load_and_not_more() -> None:
    cached = {"a": 0.75, "p": 1.0}
    for running, chosen in ((2, "a"), (4, "b")):
        views = (holding(worker("a", running=running)), worker("b"))
        assert route(*views, cached=cached, cache_weight=4.0).decode == chosen
    assert route(worker("a", running=2), worker("b"), cached=cached, cache_weight=4.0).decode == "b", "it reports none"
    views = (worker("o", "prefill"), holding(worker("p", "prefill", running=3)), worker("d"))
    assert route(*views, cached=cached, cache_weight=4.0).prefill == ("p", "o")
    assert route(*views, cached=cached).prefill == ("o", "p")


def test_the_map_knows_the_longest_beginning_by_worker_and_forgets_the_oldest() -> None:
    known, chat = PrefixMap(capacity=6), list(range(5 * BLOCK))
    known.note(known.keys(chat[: 2 * BLOCK]), "a")
    known.note(known.keys(chat), "b")
    assert known.cached(known.keys([*chat[: 4 * BLOCK], *range(BLOCK)])) == {"a": 2 * BLOCK, "b": 4 * BLOCK}
    assert known.cached(known.keys(chat, "another salt")) == {} and known.cached(known.keys(chat[1:])) == {}
    known.note(known.keys(list(range(100, 100 + 3 * BLOCK))), "c")
    assert known.cached(known.keys(chat)) == {}, "the first blocks were the oldest"
