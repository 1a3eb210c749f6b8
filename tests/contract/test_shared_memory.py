"""Handoffs through shared memory: the same answers, and damage in the memory costs the request a second prefill."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import prefill_worker
from pdspec.config import RouterConfig
from pdspec.study.processes import process
from pdspec.transfer.frames import Open, Pages
from pdspec.transfer.grpc_stream import PrefillCall
from pdspec.transfer.segment import FOLDER
from pdspec.transfer.shm_serve import Lane
from pdspec.types import Handoff
from router import relay
from tests.contract.around import channel_to, check_clean, stopping, until, worker
from tests.parity.roles import Answer, Roles, request, run_client, running


@pytest.fixture(scope="module")
def shared() -> Iterator[Roles]:
    with running(decode={"mover": "shm"}) as roles:
        yield roles


@pytest.fixture
def roles(shared: Roles) -> Iterator[Roles]:
    yield shared
    check_clean(shared)
    lanes = service_of(shared.prefill).lanes
    assert all(slots.free == slots.segment.slots for slots in lanes._mapped.values())


def service_of(running: Any) -> Any:
    return running.service


def counts(roles: Roles) -> dict[str, float]:
    return dict(service_of(roles.decode).offers.counts)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_many_prompts_in_flight_arrive_whole(roles, mode):
    many = [request(n=20 + 40 * number, seed=number, draft_prefill=mode) for number in range(8)]
    before = counts(roles)
    for asked, answer in zip(many, roles.ask(*many), strict=True):
        local = roles.ask_local(asked)
        assert (answer.tokens, answer.traces) == (local.tokens, local.traces)
        assert answer.stats.prefill_retries == 0 and answer.stats.draft_rebuilds == 0
        assert 0 < answer.stats.transfer_exposed_ms < 60_000
    after = counts(roles)
    assert after["handoffs_shm"] - before["handoffs_shm"] == 8 and after["handoffs_grpc"] == 0
    assert after["mover_fallbacks"] == 0


def flipped(lane: Any, place: list[int]) -> list[int]:
    slot = lane._slots.segment.slot(place[0] // lane._slots.segment.slot_bytes)
    slot[place[1] // 2] ^= 1
    return place


def elsewhere(lane: Any, place: list[int]) -> list[int]:
    return [lane._slots.segment.slots * lane._slots.segment.slot_bytes, place[1]]


def shorter(lane: Any, place: list[int]) -> list[int]:
    return [place[0], place[1] - 1]


def another_slot(lane: Any, place: list[int]) -> list[int]:
    size = lane._slots.segment.slot_bytes
    return [(place[0] + size) % (size * lane._slots.segment.slots), place[1]]


@pytest.mark.parametrize("damage", [flipped, elsewhere, shorter, another_slot])
def test_damage_costs_one_prefill_and_no_other_request(roles, monkeypatch, damage: Callable):
    """The third payload of the first stream is damaged; others go on beside it."""
    real, seen = Lane.place, []

    async def place(lane: Lane, seq: int, payload: Any) -> Any:
        found = await real(lane, seq, payload)
        seen.append(lane)
        first = seen[0] is lane and seen.count(lane) == 3
        return damage(lane, found) if first and found else found

    monkeypatch.setattr(Lane, "place", place)
    many = [request("none", n=60, seed=number) for number in range(3)]
    answers = roles.ask(*many, route=roles.route(roles.prefill.address, roles.prefill.address))
    assert sum(answer.stats.prefill_retries for answer in answers) == 1
    for asked, answer in zip(many, answers, strict=True):
        assert answer.tokens == roles.ask_local(asked).tokens


def test_a_slot_written_while_it_is_read_is_noticed(roles, monkeypatch):
    """A sender that does not wait for Landed: what was copied and what is hashed then differ, or what was sent."""
    cache = roles.decode.engine.host.resources.cache
    real, done = cache.write_rows, []

    def write_rows(*values: Any) -> None:
        real(*values)
        if not done and isinstance(values[5], memoryview):
            done.append(True)
            offers = service_of(roles.decode).offers
            (segment,) = offers._segments.values()
            for index in range(segment.slots):
                segment.slot(index)[:16] ^= 255

    monkeypatch.setattr(cache, "write_rows", write_rows)
    asked = request("none", n=60, seed=5)
    (answer,) = roles.ask(asked, route=roles.route(roles.prefill.address, roles.prefill.address))
    assert done and answer.stats.prefill_retries == 1 and answer.tokens == roles.ask_local(asked).tokens


def test_a_killed_prefill_worker_leaves_neither_a_name_nor_memory():
    flags = ("--model", "tiny", "--heads", "eagle3=random:0", "--chunk", "1", "--log-level", "error", "--threads", "1")
    before = set(FOLDER.glob("pdspec-*"))
    with running() as roles, process("prefill_worker", *flags) as killed:
        asked = request(n=1500, sampling={"max_tokens": 4})
        offers = service_of(roles.decode).offers

        async def scenario() -> Answer:
            async with channel_to(roles.decode.address) as channel:
                route = roles.route(killed.address, roles.prefill.address)
                task = asyncio.ensure_future(Roles.one(channel, asked, route))
                await until(lambda: offers.counts["handoffs_shm"] == 1)
                os.kill(killed.pid, signal.SIGKILL)
                return await task

        answer = run_client(scenario())
        assert answer.tokens == roles.ask_local(asked).tokens and answer.stats.prefill_retries == 1
        assert list(offers._segments) == [roles.prefill.address]
        assert not set(FOLDER.glob("pdspec-*")) - before


def test_rows_that_the_decode_worker_has_do_not_travel(roles):
    """``have_rows`` is per group; Begin states them with the rest."""
    fingerprint = roles.prefill.engine.host.resources.fingerprint
    have = {"target": 17, "draft/eagle3": 40}
    opening = Open(
        epoch=5, request=request(n=45), drafter="eagle3", draft_prefill="prefill", have_rows=have,
        fingerprint=fingerprint,
    )  # fmt: skip

    async def scenario() -> list[Any]:
        async with channel_to(roles.prefill.address) as channel, PrefillCall(channel, opening) as call:
            return [frame async for frame in call]

    frames = run_client(scenario())
    assert frames[0].rows == {"target": 45, "draft/eagle3": 45}
    for group, first in have.items():
        sent = {(frame.layer, row) for frame in frames if isinstance(frame, Pages) and frame.group == group
                for row in range(frame.start, frame.start + frame.count)}  # fmt: skip
        layers = roles.prefill.engine.host.resources.cache.layout(group).num_layers
        assert sent == {(layer, row) for layer in range(layers) for row in range(first, 45)}


def test_a_restarted_prefill_worker_shares_memory_again(caplog):
    with running() as roles, worker(prefill_worker) as other:
        asked, route = request(n=30), roles.route(other.address)
        roles.ask(asked, route=route)
        service_of(other).lanes._mapped.clear()  # as a new process at the same address would be
        answers = [roles.ask(asked, route=route)[0] for _ in range(2)]
        assert all(answer.tokens == roles.ask_local(asked).tokens for answer in answers)
        assert counts(roles) == {"handoffs_shm": 2, "handoffs_grpc": 1, "mover_fallbacks": 1}
        assert service_of(roles.decode).info().metrics["handoffs_shm"] == 2
        assert service_of(other).info().metrics["handoffs_grpc"] == 1


def test_a_prefill_worker_that_will_not_share_is_served_over_grpc_unless_shm_is_demanded(caplog):
    asked = request(n=30)
    with running(prefill={"mover": "grpc"}) as roles:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                (answer,) = roles.ask(asked)
                assert answer.tokens == roles.ask_local(asked).tokens
        assert len([record for record in caplog.records if "mover is grpc" in record.message]) == 1
        assert counts(roles) == {"handoffs_shm": 0, "handoffs_grpc": 2, "mover_fallbacks": 2}
        with stopping(relay.launch(RouterConfig(port=0))) as passing:
            route = roles.route(handoff=Handoff.RELAY, relay=passing.address)
            assert roles.ask(asked, route=route)[0].tokens == answer.tokens
        assert counts(roles)["handoffs_grpc"] == 3 and counts(roles)["mover_fallbacks"] == 2
