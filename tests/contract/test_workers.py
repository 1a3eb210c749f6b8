"""Workers under clients and peers that leave, die, stall, wait and send nonsense: a clear status, no page left held,
and both engines alive afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import decode_worker.service
import prefill_worker.service
from pdspec.config import RouterConfig
from pdspec.types import Handoff
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from router import relay
from tests.contract.around import channel_to, check_clean, held_up, status_of, stopping, until, worker
from tests.parity.roles import Roles, held_by, request, run_client, running, wait_until

LONG = {"max_tokens": 1500}


@pytest.fixture(scope="module")
def shared() -> Iterator[Roles]:
    with running(prefill={"chunk": 4, "stall_timeout_s": 0.5}) as roles:
        yield roles


@pytest.fixture
def roles(shared: Roles) -> Iterator[Roles]:
    yield shared
    check_clean(shared)


# --- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["direct", "relay", "alone"])
def test_clients_that_leave_at_any_moment_free_every_page_within_a_second(roles, path):
    dice = random.Random(path)

    async def leave(channel: grpc.aio.Channel, number: int, route: Any) -> None:
        drafter, tree = dice.choice([("none", ""), ("ngram", ""), ("eagle3", "chain(3)"), ("eagle3", "")])
        asked = request(drafter, tree, n=dice.choice([20, 300]), seed=number, sampling={"max_tokens": 500})
        if dice.random() < 0.5:
            await Roles.one(channel, asked, route, stop_after=dice.randint(1, 30))
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(dice.random() * 0.4):
                    await Roles.one(channel, asked, route)
                raise TimeoutError  # it was quicker

    async def scenario(route: Any) -> None:
        async with channel_to(roles.decode.address) as channel:
            await asyncio.gather(*(leave(channel, number, route) for number in range(12)))

    if path == "relay":
        with stopping(relay.launch(RouterConfig(port=0))) as passing:
            run_client(scenario(roles.route(handoff=Handoff.RELAY, relay=passing.address)))
            assert wait_until(lambda: roles.held() == 0)
    else:
        run_client(scenario(roles.route() if path == "direct" else dataclasses.replace(roles.route(), prefill=())))
        assert wait_until(lambda: roles.held() == 0)
    assert roles.ask(request())[0].tokens == roles.ask_local(request()).tokens


def test_a_prompt_cancelled_on_its_way_into_the_prefill_queue_is_forgotten(roles):
    with held_up(roles.prefill):

        async def scenario() -> None:
            async with channel_to(roles.decode.address) as channel:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await Roles.one(channel, request(n=500), roles.route())

        run_client(scenario())
        assert wait_until(lambda: held_by(roles.decode) == 0)
    scheduler = roles.prefill.engine.host.scheduler

    def idle() -> bool:  # asked on the engine's thread, behind whatever it had queued
        asked = roles.prefill.engine.post(lambda: not (scheduler.waiting or scheduler.running or scheduler.held))
        return asked.result(10)

    assert wait_until(idle)


def test_a_reservation_cancelled_in_the_queue_lets_the_next_one_in():
    with running(decode={"cache_tokens": 1024}) as roles:
        scheduler = roles.decode.engine.host.scheduler

        async def scenario() -> list[int]:
            async with channel_to(roles.decode.address) as channel:

                def ask(number: int, rows: int) -> asyncio.Task:
                    asked = request(n=100, seed=number, sampling={"max_tokens": rows})
                    return asyncio.ensure_future(Roles.one(channel, asked, roles.route()))

                holder = ask(1, 250)
                await until(lambda: len(scheduler.granted) + len(scheduler.running) == 1)
                waiter = ask(2, 800)
                await until(lambda: len(scheduler.waiting) == 1)
                last = ask(3, 60)
                await until(lambda: len(scheduler.waiting) == 2)
                waiter.cancel()
                answer = await last
                assert len((await holder).tokens) == 250
                return answer.tokens

        tokens = run_client(scenario())
        assert tokens == roles.ask_local(request(n=100, seed=3, sampling={"max_tokens": 60})).tokens


def test_a_deadline_ends_the_answer_and_frees_its_pages(roles):
    for asked in (request(sampling=LONG), request(n=1900)):  # in decode, in prefill
        error = status_of(roles, dataclasses.replace(asked, deadline_s=0.15))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert wait_until(lambda: roles.held() == 0)


@pytest.mark.parametrize("seats", [1, 2])
def test_more_answers_than_seats_wait_their_turn(seats):
    with running(decode={"max_batch": seats}) as roles:
        many = [request(seed=number, n=30) for number in range(5)]
        for asked, answer in zip(many, roles.ask(*many), strict=True):
            assert answer.tokens == roles.ask_local(asked).tokens


# --- prefill workers that fail ---------------------------------------------------------------------------------------


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen, str]]:
    """A prefill worker as a process of its own, slow enough to be caught in mid-stream."""
    flags = ["--model", "tiny", "--heads", "eagle3=random:0", "--cache-tokens", "8192", "--chunk", "1"]
    command = [sys.executable, "-m", "prefill_worker", *flags, "--threads", "1", "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout
        line = started.stdout.readline()
        assert line.startswith("ready role=prefill address=")
        yield started, line.strip().rpartition("=")[2]
        started.send_signal(signal.SIGCONT)
        started.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_prefill_process_that_dies_or_hangs_in_mid_stream_never_yields_a_cut_answer(process, how):
    started, address = process
    asked = request(n=1500, sampling={"max_tokens": 12})
    with running(decode={"stall_timeout_s": 1.0}) as roles:

        async def scenario() -> list[int]:
            async with channel_to(roles.decode.address) as channel:
                route = roles.route(address, roles.prefill.address)
                task = asyncio.ensure_future(Roles.one(channel, asked, route))
                await until(lambda: len(roles.decode.engine.host.scheduler.granted) == 1)
                await asyncio.sleep(0.2)
                assert not task.done()
                started.send_signal(how)
                answer = await task
                assert answer.stats.prefill_retries == 1
                return answer.tokens

        assert run_client(scenario()) == roles.ask_local(asked).tokens
        error = status_of(roles, asked, roles.route(address))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and address in error.details()


def test_an_engine_that_dies_under_a_prefill_worker_is_another_workers_chance(roles, monkeypatch):
    with worker(prefill_worker) as dying:

        def bug(work: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(dying.engine.host.engine, "step", bug)
        expected = roles.ask_local(request()).tokens
        for _ in range(2):  # the stream that meets the bug, and one that finds the engine gone
            with running(decode={"stall_timeout_s": 0.5}) as quick:
                (answer,) = quick.ask(request(), route=quick.route(dying.address, roles.prefill.address))
                assert answer.tokens == expected and answer.stats.prefill_retries == 1
        assert not dying.alive()


def test_a_prompt_too_long_for_one_prefill_worker_goes_to_the_next(roles):
    asked = request(n=400)
    with worker(prefill_worker, cache_tokens=256) as small:
        (answer,) = roles.ask(asked, route=roles.route(small.address, roles.prefill.address))
        assert answer.tokens == roles.ask_local(asked).tokens and answer.stats.prefill_retries == 1
        error = status_of(roles, asked, roles.route(small.address))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and "KV pages" in error.details()


def test_the_policy_fail_tries_one_prefill_worker_only(roles):
    with worker(decode_worker, on_prefill_failure="fail") as strict:
        other = Roles(roles.prefill, strict, roles.local)
        error = status_of(other, request(), other.route("127.0.0.1:1", roles.prefill.address))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert wait_until(lambda: held_by(strict) == 0)


@pytest.mark.parametrize("asked", [request("none"), request("ngram")])
def test_other_heads_do_not_matter_to_requests_that_use_none(roles, asked):
    with worker(prefill_worker, heads={"eagle3": "random:9"}) as other:
        (answer,) = roles.ask(asked, route=roles.route(other.address))
        assert answer.tokens == roles.ask_local(asked).tokens and answer.stats.prefill_retries == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"numerics": "fast"}, "numerics"), ({"drafters": ("none", "ngram"), "drafter": "none", "heads": {}}, "eagle3")],
)
def test_a_refusal_names_the_field_and_both_sides(roles, changes, field):
    with worker(prefill_worker, **changes) as other:
        error = status_of(roles, request(), roles.route(other.address, roles.prefill.address))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"fingerprint.{'drafter/' if field == 'eagle3' else ''}{field}" in error.details()
        assert "decode@" in error.details()


def test_a_prefill_worker_whose_own_defaults_differ_serves_what_it_is_asked(roles):
    """Drafter, tree and side of the draft prefill are the decode worker's to choose."""
    with worker(prefill_worker, drafter="ngram", tree="chain(2)", draft_prefill="decode") as other:
        with running(decode={"tree": "dynamic(3,20,40)"}) as wide:
            asked = dataclasses.replace(request(), drafter="")
            (answer,) = wide.ask(asked, route=wide.route(other.address))
            local = wide.ask_local(dataclasses.replace(asked, drafter="eagle3", tree="dynamic(3,20,40)"))
            assert (answer.tokens, answer.traces) == (local.tokens, local.traces)
            assert answer.stats.draft_rebuilds == 0 and answer.stats.draft_kv_bytes > 0


# --- ways that are cut ------------------------------------------------------------------------------------------------


def test_a_way_that_failed_is_told_tried_last_and_healed(roles):
    dead = "127.0.0.1:1"
    with worker(decode_worker) as cut:
        pair = Roles(roles.prefill, cut, roles.local)

        async def told() -> tuple[str, ...]:
            async with channel_to(cut.address) as channel:
                return tuple((await rpc.WorkerStub(channel).Status(pb.StatusRequest())).unreachable)

        expected = roles.ask_local(request()).tokens
        route = pair.route(dead, roles.prefill.address)
        for retries, down in ((1, (dead,)), (0, (dead,))):  # the second request does not try it first
            (answer,) = pair.ask(request(), route=route)
            assert (answer.tokens, answer.stats.prefill_retries) == (expected, retries)
            assert run_client(told()) == down


def test_damaged_frames_cost_a_retry_and_never_a_token(roles):
    expected = roles.ask_local(request()).tokens
    with worker(prefill_worker, frame_faults={"flip": 1.0}) as bad:
        (answer,) = roles.ask(request(), route=roles.route(bad.address, roles.prefill.address))
        assert answer.tokens == expected and answer.stats.prefill_retries == 1
