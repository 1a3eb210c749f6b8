"""Both schedulers over a real page pool: order of arrival, bounds, and no page lost whatever the order of events."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.scheduler import DecodeScheduler
from pdspec.cache.pool import PagePool, PoolExhausted
from prefill_worker.scheduler import PrefillScheduler


@dataclass(eq=False)
class Item:
    """A prompt or a reservation of ``num_pages`` pages."""

    num_pages: int
    remaining: int = 0
    finished: bool = False
    pages: list[int] = field(default_factory=list)
    grants: int = 0
    priority: int = 0
    number: int = -1
    paused: bool = False

    def grant(self) -> None:
        self.grants += 1


# --- prefill ---------------------------------------------------------------------------------------------------------


def test_a_step_shares_its_tokens_in_order_of_arrival():
    scheduler = PrefillScheduler(PagePool(20, 8), chunk=10)
    first, second, third = Item(2, remaining=4), Item(2, remaining=9), Item(2, remaining=3)
    for item in (first, second, third):
        scheduler.add(item)
    assert scheduler.plan() == [(first, 4), (second, 6)]
    first.remaining, first.finished, second.remaining = 0, True, 3
    assert scheduler.plan() == [(second, 3), (third, 3)]


def test_a_prompt_that_waits_for_pages_holds_none_and_is_not_overtaken():
    scheduler = PrefillScheduler(PagePool(4, 8), chunk=10)
    big, bigger, small = Item(3, remaining=20), Item(4, remaining=9), Item(1, remaining=1)
    for item in (big, bigger, small):
        scheduler.add(item)
    assert scheduler.plan() == [(big, 10)] and not bigger.pages and not small.pages
    scheduler.release(big)
    assert scheduler.plan() == [(bigger, 9)] and not small.pages
    scheduler.release(bigger)
    assert scheduler.plan() == [(small, 1)]


def test_a_finished_prompt_keeps_its_pages_until_its_frames_are_out():
    scheduler = PrefillScheduler(PagePool(4, 8), chunk=10)
    item = Item(3, remaining=5)
    scheduler.add(item)
    scheduler.plan()
    item.remaining, item.finished = 0, True
    assert scheduler.plan() == [] and scheduler.held == [item] and scheduler.pool.held == 3
    scheduler.release(item)
    scheduler.release(item)
    assert scheduler.pool.held == 0


@pytest.mark.parametrize("scheduler", [PrefillScheduler(PagePool(4, 8), 9), DecodeScheduler(PagePool(4, 8), 9)])
def test_what_can_never_fit_is_refused_at_once_and_leaves_no_trace(scheduler):
    with pytest.raises(PoolExhausted, match="5 KV pages wanted"):
        scheduler.add(Item(5))
    assert not scheduler.waiting and scheduler.pool.held == 0


# --- decode ----------------------------------------------------------------------------------------------------------


def test_a_reservation_is_granted_at_once_or_when_room_comes_in_order_of_arrival():
    scheduler = DecodeScheduler(PagePool(5, 8), max_batch=9)
    first, second, third = Item(3), Item(3), Item(2)
    for item in (first, second, third):
        scheduler.add(item)
    assert [item.grants for item in (first, second, third)] == [1, 0, 0]  # the third would fit, but is not first
    scheduler.join(first)
    scheduler.release(first)
    assert [item.grants for item in (first, second, third)] == [1, 1, 1]
    assert scheduler.pool.held == 5


def test_seats_are_bounded_granted_and_running_together():
    scheduler = DecodeScheduler(PagePool(50, 8), max_batch=2)
    items = [Item(1) for _ in range(4)]
    for item in items:
        scheduler.add(item)
    scheduler.join(items[0])
    assert [item.grants for item in items] == [1, 1, 0, 0]
    scheduler.release(items[1])  # while its prefill lands
    assert [item.grants for item in items] == [1, 1, 1, 0]


def test_a_released_reservation_does_not_come_back_when_its_prefill_lands():
    scheduler = DecodeScheduler(PagePool(5, 8), max_batch=2)
    item = Item(3)
    scheduler.add(item)
    scheduler.release(item)
    scheduler.join(item)
    assert not scheduler.running and scheduler.pool.held == 0


def test_leaving_the_queue_lets_the_next_in():
    scheduler = DecodeScheduler(PagePool(4, 8), max_batch=9)
    running, waiting, last = Item(2), Item(4), Item(2)
    for item in (running, waiting, last):
        scheduler.add(item)
    assert last.grants == 0
    scheduler.release(waiting)
    assert last.grants == 1 and waiting.grants == 0


# --- any order of events ---------------------------------------------------------------------------------------------

EVENTS = st.lists(st.tuples(st.sampled_from(["add", "step", "release"]), st.integers(0, 11)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_prefill_books_balance_and_all_prompts_end(events):
    scheduler, items = PrefillScheduler(PagePool(8, 4), chunk=7), []

    def step() -> None:
        work = scheduler.plan()
        assert sum(count for _, count in work) <= 7 and all(count > 0 for _, count in work)
        for item, count in work:
            item.remaining -= count
            item.finished = item.remaining == 0

    for what, number in events:
        if what == "add":
            items.append(Item(1 + number % 8, remaining=1 + number))
            scheduler.add(items[-1])
        elif what == "release" and items:
            scheduler.release(items[number % len(items)])
        else:
            step()
        scheduler.check_integrity()
        waiting = [items.index(item) for item in scheduler.waiting]
        assert waiting == sorted(waiting) and not any(item.pages for item in scheduler.waiting)
    for _ in range(400):
        step()
        for item in list(scheduler.held):
            scheduler.release(item)
    assert scheduler.pool.held == 0 and not scheduler.waiting and not scheduler.running


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_decode_books_balance_and_all_reservations_are_served(events):
    scheduler, items = DecodeScheduler(PagePool(8, 4), max_batch=3), []
    for what, number in events:
        if what == "add":
            items.append(Item(1 + number % 8))
            scheduler.add(items[-1])
        elif items and what == "release":
            scheduler.release(items[number % len(items)])
        elif items:
            scheduler.join(items[number % len(items)])
        scheduler.check_integrity()
        held = [item for item in items if item.pages]
        assert len(held) <= 3 and set(held) == {*scheduler.granted, *scheduler.running}
        grants = [items.index(item) for item in scheduler.waiting]
        assert grants == sorted(grants)
        if scheduler.waiting:  # nobody waits without a reason
            assert len(held) == 3 or scheduler.waiting[0].num_pages > scheduler.pool.free
    while scheduler.granted or scheduler.running:
        scheduler.release((scheduler.granted + scheduler.running)[0])
    assert scheduler.pool.held == 0 and not scheduler.waiting
    assert all(item.grants <= 1 for item in items)
