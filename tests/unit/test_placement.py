"""Who computes a prompt, by measured times: a pure function, what it is fed with, and what it does without figures."""

from __future__ import annotations

import dataclasses

import pytest

import decode_worker.links
from decode_worker.links import KNOWN_S, Links
from pdspec.engine.rates import Line, Mean, Rate
from pdspec.types import LINK_LATENCY, LINK_OVERHEAD, LINK_RATE, Handoff, Route, WorkerInfo
from router.placement import Estimate, estimate
from router.policy import WorkerState, WorkerView, placed

LINK = "p:1"
DECODE = {"prefill_tokens_per_second": 1000.0, "prefill_chunk": 512.0, "step_seconds": 0.02,
          "handoff_bytes_per_token": 1000.0, LINK_RATE + LINK: 1e6, LINK_OVERHEAD + LINK: 0.01}  # fmt: skip
PREFILL = {"prefill_tokens_per_second": 1000.0}


def info(role: str, metrics: dict[str, float]) -> WorkerInfo:
    address = "d:1" if role == "decode" else "p:1"
    return WorkerInfo(worker_id=role, role=role, address=address, model="m", fingerprint="f", metrics=metrics)


def of(
    decode: dict[str, float] | None = None, prefill: dict[str, float] | None = None, *, missing: float = 1000,
    computed: float = 1000, running: int = 0, waiting_tokens: int = 0,
) -> Estimate:  # fmt: skip
    return estimate(
        info("decode", {**DECODE, **(decode or {})}), info("prefill", {**PREFILL, **(prefill or {})}), link=LINK,
        missing=missing, computed=computed, running=running, waiting_tokens=waiting_tokens,
    )  # fmt: skip


def test_transfer_is_exposed_as_far_as_it_outlasts_the_compute():
    assert of().elsewhere == pytest.approx(1.0 + 0.01)  # as long as the compute: hidden behind it
    assert of({LINK_RATE + LINK: 4e6}).elsewhere == pytest.approx(1.0 + 0.01)
    assert of({LINK_RATE + LINK: 2.5e5}).elsewhere == pytest.approx(4.0 + 0.01)
    assert of(missing=100, computed=1000).elsewhere == pytest.approx(1.0 + 0.01)  # the cache saves bytes alone


def test_the_queue_counts_what_was_reported_and_what_was_sent_since():
    assert of(prefill={"prefill_backlog_tokens": 2000.0}, waiting_tokens=500).elsewhere == pytest.approx(3.51)


def test_here_every_running_answer_waits_too():
    assert of().here == pytest.approx(1.0)
    assert of(running=3).here == pytest.approx(4.0 + 2 * 0.02)
    assert of({"prefill_backlog_tokens": 500.0}, running=3).here == pytest.approx(4.5 + 0.04)
    assert of(missing=100, running=3).here == pytest.approx(0.4 + 0.02)
    assert of({"prefill_step_seconds": 0.1}, running=1).here == pytest.approx(2 * 1.2 + 0.04)  # two chunks


@pytest.mark.parametrize(
    ("changes", "choice"),
    [
        ({}, "local"),  # the same rate, and no overhead
        ({"running": 1}, "remote"),
        ({"running": 1, "decode": {LINK_RATE + LINK: 1e5}}, "local"),  # a slow link
        ({"running": 1, "waiting_tokens": 3000}, "local"),  # a long queue
        ({"running": 8, "missing": 50}, "local"),  # a short rest of a long prompt
        ({"prefill": {"prefill_tokens_per_second": 4000.0}}, "local"),  # four times as fast, but the link is not
        ({"prefill": {"prefill_tokens_per_second": 4000.0}, "decode": {LINK_RATE + LINK: 1e7}}, "remote"),
    ],
)
def test_the_choice(changes, choice):
    assert of(**changes).choice == choice


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["prefill_tokens_per_second", "handoff_bytes_per_token", LINK_RATE + LINK])
def test_without_a_figure_nothing_is_chosen(name, bad):
    assert of({name: bad}).choice == "unknown"


def test_the_route_loses_its_prefill_workers_only_where_here_is_sooner():
    def view(one: WorkerInfo, **changes) -> WorkerView:
        plain = WorkerView(address=one.address, role=one.role, state=WorkerState.READY, info=one)
        return dataclasses.replace(plain, **changes)

    route = Route(decode="d:1", prefill=("p:1",), handoff=Handoff.DIRECT)
    decode, prefill = view(info("decode", DECODE)), view(info("prefill", PREFILL))
    ask = {"prompt_tokens": 1000, "cached": {}}
    kept, found = placed([decode, prefill], route, **ask)
    assert kept.prefill == () and found.choice == "local" and kept.decode == "d:1"
    assert placed([dataclasses.replace(decode, pending=2), prefill], route, **ask)[0] == route
    queued = dataclasses.replace(prefill, pending_tokens=9000)
    assert placed([dataclasses.replace(decode, pending=2), queued], route, **ask)[0].prefill == ()
    lost = dataclasses.replace(prefill, state=WorkerState.LOST)
    assert placed([decode, lost], route, **ask) == (route, Estimate(elsewhere=None, here=None))
    assert placed([decode, prefill], dataclasses.replace(route, prefill=()), **ask)[1].choice == "unknown"


def test_a_guessed_cache_counts_where_the_worker_has_one():
    def view(role: str, metrics: dict[str, float]) -> WorkerView:
        one = info(role, metrics)
        return WorkerView(address=one.address, role=role, state=WorkerState.READY, info=one)

    route = Route(decode="d:1", prefill=("p:1",))
    share = {"prompt_tokens": 1000, "cached": {"d:1": 0.75, "p:1": 0.5}}
    empty = placed([view("decode", DECODE), view("prefill", PREFILL)], route, **share)[1]
    assert (empty.here, empty.elsewhere) == pytest.approx((1.0, 1.01))
    pages = {"prefix_cached_pages": 5.0}
    held = placed([view("decode", {**DECODE, **pages}), view("prefill", {**PREFILL, **pages})], route, **share)[1]
    assert (held.here, held.elsewhere) == pytest.approx((0.25, 0.51))


def test_links_tell_what_they_carried_until_it_is_old(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(decode_worker.links.time, "monotonic", lambda: now[0])
    links = Links()
    assert links.figures() == {"handoff_bytes_per_token": 0.0}
    links.carried(LINK, moved=2_000_000, tokens=1000, seconds=2.6, queue=0.5, prefill=1.0, sending=2.0)
    found = links.figures()
    assert found[LINK_RATE + LINK] == pytest.approx(1e6) and found["handoff_bytes_per_token"] == pytest.approx(2000)
    assert found[LINK_OVERHEAD + LINK] == pytest.approx(0.1)
    assert found[LINK_LATENCY + LINK] == 0.0
    for _ in range(40):  # the link has become slower
        links.carried(LINK, moved=1_000_000, tokens=500, seconds=11.0, queue=0.0, prefill=0.5, sending=10.0)
    assert links.figures()[LINK_RATE + LINK] == pytest.approx(1e5, rel=0.05)
    links.carried(LINK, moved=0, tokens=1, seconds=1.0, queue=0.0, prefill=1.0, sending=0.0)  # nothing moved
    now[0] += KNOWN_S
    assert list(links.figures()) == ["handoff_bytes_per_token"]


def test_a_link_s_latency_is_told_from_its_rate():
    line = Line()
    assert line.fit == (0.0, 0.0)
    line.add(100, 2.0)
    assert line.fit == pytest.approx((0.0, 0.02))  # one size says nothing of a latency
    for count in (1000, 4000, 2000):
        line.add(count, 1.0 + 0.01 * count)
    assert line.fit == pytest.approx((1.0, 0.01))
    guarded = Line(4.0)
    for count, seconds in ((100, 1.0), (200, 2.0), (100, 50.0)):
        guarded.add(count, seconds)
    assert sum(guarded.fit[i] * (1, 200)[i] for i in (0, 1)) < 4.0
    falling = Line()
    falling.add(10, 5.0)
    falling.add(1000, 1.0)
    assert falling.fit[0] == 0.0 and falling.fit[1] > 0
    steep = Line()
    steep.add(10, 0.0)
    steep.add(20, 3.0)
    assert steep.fit[0] == 0.0 and steep.fit[1] > 0
    assert of({LINK_LATENCY + LINK: 0.5, LINK_RATE + LINK: 1e6}).elsewhere == pytest.approx(1.51)
    assert of({LINK_LATENCY + LINK: 0.5, LINK_RATE + LINK: 1e9}).elsewhere == pytest.approx(1.01)


def test_rates_weigh_observations_by_their_length_and_forget():
    rate, mean = Rate(), Mean()
    assert rate.value == mean.value == 0.0
    rate.add(10, 1.0)
    rate.add(1000, 10.0)
    assert rate.value == pytest.approx((9 + 1000) / 10.9)
    for _ in range(100):
        mean.add(4.0)
        rate.add(5, 1.0)
    assert mean.value == pytest.approx(4.0) and rate.value == pytest.approx(5.0, rel=0.01)
