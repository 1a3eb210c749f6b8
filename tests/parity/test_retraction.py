"""Pages taken from running answers at random steps, kept in host memory or computed anew: nothing shows."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from decode_worker.retraction import Costs
from pdspec.spec.registry import NAMES, family
from tests.contract.around import check_clean
from tests.parity.roles import EVERY, WITH_MEMORY, Answer, Roles, request, running

TREES = {"chain": "chain(3)", "static": "static(2x2)", "dynamic": "dynamic(3,2,5)"}
CASES = [(name, TREES[kind]) for name in NAMES for kind in family(name).DESCRIPTION.trees] + [("none", "")]
WAYS = {
    "greedy": {"logprobs": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "logprobs": 2, "repetition_penalty": 1.2, "presence_penalty": 0.3},
}  # fmt: skip
KEEPS_A_POOL = ("lookahead", *WITH_MEMORY)  # what they drafted before a replay is part of what they draft after it
SMALL = {"cache_tokens": 16 * 100, "max_batch": 32, "reserve_headroom": 0, "kv_overcommit": 8.0, "kv_watermark": 0.0}


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    with running(**EVERY, dtype="float32", decode=SMALL) as roles:
        yield roles
        check_clean(roles)


def forced(roles: Roles, monkeypatch: pytest.MonkeyPatch, *, memory: int, chance: float = 0.15) -> Any:
    """Every step takes the pages of some of those that run; returns the host."""
    host, dice = roles.decode.engine.host, random.Random(5)
    scheduler, make_room = host.scheduler, host.scheduler.make_room

    def shaken() -> Any:
        for item in list(scheduler.running):
            if dice.random() < chance:
                scheduler.retract(item)
        return make_room()

    monkeypatch.setattr(scheduler, "make_room", shaken)
    monkeypatch.setattr(host.parking, "_memory", memory)
    # Copies are free in one case and replays in the other, whatever this machine says.
    monkeypatch.setattr(Costs, "keep", lambda self, nbytes: float(memory == 0))
    monkeypatch.setattr(Costs, "replay", lambda self, rows: float(memory > 0))
    return host


def same(answer: Answer, local: Answer, *, traces: bool) -> None:
    assert (answer.tokens, answer.logprobs) == (local.tokens, local.logprobs)
    if traces:
        assert answer.traces == local.traces
        assert answer.stats is not None and local.stats is not None
        assert answer.stats.verifications == local.stats.verifications


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["kept", "replayed"])
@pytest.mark.parametrize("way", WAYS)
def test_answers_whose_pages_are_taken_at_random_steps_are_as_undisturbed(roles, monkeypatch, way, memory):
    asked = [request(*case, n=20 + 3 * i, seed=i, sampling=WAYS[way]) for i, case in enumerate(CASES)]
    local = [roles.ask_local(one) for one in asked]
    host = forced(roles, monkeypatch, memory=memory)
    before = dict(host.parking.counts)
    answers = roles.ask(*asked)
    done = {name: count - before[name] for name, count in host.parking.counts.items()}
    assert done["resumed"] >= len(CASES)
    assert min(done["retractions_kept"], done["retractions_replayed"]) == 0
    for one, answer, due in zip(asked, answers, local, strict=True):
        pool = one.drafter in WITH_MEMORY or (memory == 0 and one.drafter in (*KEEPS_A_POOL, "sparse", "combined"))
        same(answer, due, traces=not pool)
    assert host.parking.held_bytes == 0


def test_by_the_ratio_rule_pages_are_always_kept(roles, monkeypatch):
    sampling = {"temperature": 0.8, "top_p": 0.95, "verify": "rejection"}
    cases = [case for case in CASES if case[0] not in WITH_MEMORY]
    asked = [request(*case, n=20 + 3 * i, seed=i, sampling=sampling) for i, case in enumerate(cases)]
    local = [roles.ask_local(one) for one in asked]
    host = forced(roles, monkeypatch, memory=0)
    replays = host.parking.counts["retractions_replayed"]
    for answer, due in zip(roles.ask(*asked), local, strict=True):
        same(answer, due, traces=True)
    assert host.parking.counts["retractions_replayed"] == replays and host.parking.counts["retract_memory_exceeded"]


def test_a_pool_that_is_promised_many_times_over_serves_all_of_them(roles):
    host = roles.decode.engine.host
    before = host.scheduler.retractions
    asked = [
        request(*CASES[i % len(CASES)], n=10 + i, seed=i, sampling={"max_tokens": 200, "temperature": 0.7 * (i % 2)})
        for i in range(32)
    ]
    answers = roles.ask(*asked)
    assert host.scheduler.retractions > before
    for one, answer in zip(asked, answers, strict=True):
        assert answer.tokens == roles.ask_local(one).tokens


def test_an_answer_that_nobody_reads_pauses_and_the_others_go_on(roles):
    host, service = roles.decode.engine.host, roles.decode.service
    asked = request("none", seed=4, sampling={"max_tokens": 120})
    loop = roles.decode._service._loop

    async def slow() -> list[int]:
        config = host.resources.config
        host.resources.config = config.replace(stream_buffer=4)
        try:
            chunks = service._chunks(host.new_answer(asked, loop), roles.route())
            tokens = list((await anext(chunks)).token_ids)
        finally:
            host.resources.config = config
        await asyncio.sleep(1.0)  # the others are served meanwhile
        (answer,) = [one for one in host.scheduler.admitted() if one.request.request_id == asked.request_id]
        assert answer.paused and answer.sequence.num_output <= 8
        async for chunk in chunks:
            tokens += chunk.token_ids
        return tokens

    waiting = asyncio.run_coroutine_threadsafe(slow(), loop)
    others = [request("eagle3", seed=seed, sampling={"max_tokens": 60}) for seed in (11, 12)]
    for one, answer in zip(others, roles.ask(*others), strict=True):
        assert answer.tokens == roles.ask_local(one).tokens
    assert waiting.result(30) == roles.ask_local(asked).tokens
