"""Which role is short of workers, from what the router lists."""

from __future__ import annotations

import pytest

from router.advice import Goals, acceptance, advise, decode_load, prefill_load

GOALS = Goals(ttft_s=1.0, tpot_s=0.1)


def worker(address, role, *, running=0, queued=0, state="ready", **metrics):
    return {"address": address, "role": role, "state": state, "running": running, "queued": queued, "metrics": metrics}


def prefill(address, backlog, rate=1000.0, **more):
    return worker(address, "prefill", prefill_backlog_tokens=backlog, prefill_tokens_per_second=rate, **more)


def asks(count, max_tokens=100):
    return [{"max_tokens": max_tokens}] * count


def test_prefill_waits_for_the_backlog_of_all_at_the_rate_of_all():
    load = prefill_load([prefill("a", 3000, running=2), prefill("b", 1000), prefill("c", 9999, state="lost")], GOALS)
    assert (load.workers, load.wait_s, load.pressure) == (("b", "a"), 2.0, 2.0)
    assert prefill_load([worker("a", "prefill")], GOALS).pressure == 0.0


@pytest.mark.parametrize("length, tpot, pressure", [(0.0, 0.12, 1.2), (1.0, 0.12, 1.2), (3.0, 0.04, 0.4)])
def test_accepted_drafts_make_decoding_faster(length, tpot, pressure):
    load = decode_load([worker("a", "decode", running=4, step_seconds=0.12)], asks(4), GOALS, acceptance_length=length)
    assert (load.tpot_s, load.wait_s) == (pytest.approx(tpot), 0.0)
    assert load.pressure == pytest.approx(pressure)


def test_answers_wait_for_seats_at_workers_and_at_the_router():
    workers = [worker("a", "decode", running=4, queued=1, step_seconds=0.05)]
    load = decode_load(workers, asks(8), GOALS, acceptance_length=1.0)  # 3 more are at the router
    assert load.wait_s == pytest.approx(4 * 100 * 0.05 / 4) and load.pressure == pytest.approx(5.0)


def test_the_role_with_room_gives_its_least_loaded_worker():
    idle = [worker("d1", "decode", running=1, step_seconds=0.01), worker("d0", "decode", step_seconds=0.01)]
    tight, roomy = prefill_load([prefill("p", 5000)], GOALS), decode_load(idle, asks(1), GOALS, acceptance_length=1)
    move = advise(tight, roomy, GOALS)
    assert move and (move.address, move.role) == ("d0", "prefill") and "wait 5.00 s" in move.why
    busy = decode_load([worker("d", "decode", running=2, step_seconds=0.5)], asks(2), GOALS, acceptance_length=2)
    move = advise(prefill_load([prefill("p0", 10, running=1), prefill("p1", 0)], GOALS), busy, GOALS)
    assert move and (move.address, move.role) == ("p1", "decode")


def test_no_advice_where_both_are_busy_nobody_is_or_one_is_left():
    busy = decode_load([worker("d", "decode", running=2, step_seconds=0.5)], asks(2), GOALS, acceptance_length=1)
    idle = decode_load([worker("d", "decode")], [], GOALS, acceptance_length=0)
    assert advise(prefill_load([prefill("a", 5000), prefill("b", 0)], GOALS), busy, GOALS) is None
    assert advise(prefill_load([prefill("a", 0), prefill("b", 0)], GOALS), idle, GOALS) is None
    assert advise(prefill_load([prefill("a", 5000)], GOALS), idle, GOALS) is None  # decode keeps its last
    assert advise(prefill_load([], GOALS), busy, GOALS) is None


def test_acceptance_is_that_between_two_looks():
    before = [worker("a", "decode", generation_tokens=100, verifications=80)]
    now = [worker("a", "decode", generation_tokens=160, verifications=100), worker("p", "prefill")]
    assert acceptance(now, before) == 3.0
    assert acceptance(before, before) == 0.0
    restarted = [worker("a", "decode", generation_tokens=6, verifications=2)]
    assert acceptance(restarted, now) == 0.0
