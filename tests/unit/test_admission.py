"""The order in which requests wait, how long, and who is turned away."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from decode_worker.retraction import Costs, Way, cheapest
from pdspec.config import RouterConfig
from pdspec.errors import Overloaded
from pdspec.types import GenerateRequest, SamplingParams, WorkerInfo
from router.fairness import FairQueue
from router.pace import Pace, Work, in_time, spoils, wait_s
from router.policy import WorkerState, WorkerView
from router.turnstile import Capacity, Turnstile

INFO = WorkerInfo(
    worker_id="d", role="decode", address="a", model="m", fingerprint="f", total_pages=10, page_size=10, seats=2,
    overcommit=1.0,
)  # fmt: skip
VIEW = WorkerView(address="a", role="decode", state=WorkerState.READY, info=INFO)


def order(queue: FairQueue) -> list[str]:
    return [queue.pop().item for _ in range(len(queue))]


def test_tenants_take_turns_by_tokens_and_priorities_go_first() -> None:
    queue = FairQueue()
    for number in range(4):
        queue.push(f"many{number}", tokens=100, tenant="many")
    queue.push("few0", tokens=100, tenant="few")
    queue.push("few1", tokens=100, tenant="few")
    queue.push("urgent", tokens=1000, tenant="many", priority=1)
    assert order(queue) == ["urgent", "many0", "few0", "many1", "few1", "many2", "many3"]


def test_a_tenant_that_was_silent_gets_no_credit_for_it() -> None:
    queue = FairQueue()
    for number in range(3):
        queue.push(f"a{number}", tokens=100, tenant="a")
    assert [queue.pop().item, queue.pop().item] == ["a0", "a1"]
    for number in range(3):
        queue.push(f"b{number}", tokens=100, tenant="b")
    assert order(queue) == ["b0", "a2", "b1", "b2"]


def test_a_pace_tells_what_a_token_takes_beside_more() -> None:
    pace = Pace()
    for _ in range(200):
        for running in (2, 4, 6):
            pace.chunk(1, 0.01 + 0.002 * running, running)
    assert pace.token_s(8) == pytest.approx(0.026, rel=0.02)
    running = [Work(tokens=10), Work(tokens=50)]
    assert wait_s(pace, running, []) == pytest.approx(10 * 0.014, rel=0.05)
    assert wait_s(pace, running, [Work(tokens=10)]) == pytest.approx(20 * 0.014, rel=0.05)
    assert in_time(pace, Work(tokens=100, left_s=1.0), running) > 0
    assert in_time(pace, Work(tokens=100, left_s=2.0), running) < 0
    assert spoils(pace, [Work(tokens=100, left_s=1.3)]) and not spoils(pace, [Work(tokens=100, left_s=9.0)])


def ask(tokens: int, **changes) -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt_ids=(1,) * 10, sampling=SamplingParams(max_tokens=tokens), **changes)


def test_what_fits_goes_what_waits_goes_in_order_and_the_rest_is_refused() -> None:
    assert Capacity.of([VIEW]) == Capacity(seats=2, tokens=100)
    gone: list[str] = []

    async def one(gate: Turnstile, name: str, release: asyncio.Event, **changes) -> None:
        async with gate.entered(ask(30, **changes), name, 0.0):
            gone.append(name)
            await release.wait()

    async def scenario() -> None:
        gate = Turnstile(RouterConfig(max_queue=2), lambda: [VIEW])
        release = asyncio.Event()
        tasks = [asyncio.create_task(one(gate, name, release)) for name in ("a", "b", "c")]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(one(gate, "urgent", release, priority=1)))
        await asyncio.sleep(0.01)
        assert gone == ["a", "b"] and len(gate.queue) == 2
        with pytest.raises(Overloaded, match="2 requests wait") as refused:
            await one(gate, "e", release)
        assert refused.value.retry_after_ms >= 100 and gate.refused == 1
        release.set()
        await asyncio.gather(*tasks)
        assert gone == ["a", "b", "urgent", "c"] and not gate.inside and not len(gate.queue)

    asyncio.run(scenario())


def test_the_cheaper_way_is_taken_unless_it_would_change_tokens() -> None:
    costs = Costs(copy_s=1e-9, row_s=1e-3)
    assert costs.way(nbytes=1000, rows=10, room=10_000, exact=True) is Way.KEEP
    assert costs.way(nbytes=1000, rows=10, room=10, exact=True) is Way.REPLAY
    assert costs.way(nbytes=1000, rows=10, room=10, exact=False) is Way.KEEP
    assert replace(costs, row_s=1e-9).way(nbytes=10**9, rows=1, room=10**10, exact=True) is Way.REPLAY
    assert cheapest([]) is None
