"""The simulator: exact where a hand can compute it, the real policy's choices in large fleets, and public traces."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdspec.errors import ConfigError
from pdspec.study.simulator.events import Clock, Machine
from pdspec.study.simulator.fleet import Side, route
from pdspec.study.simulator.run import Deployment, Goal, Simulation, simulate
from pdspec.study.simulator.sweep import splits, sweep
from pdspec.study.simulator.times import WorkerTimes, steps_of
from pdspec.study.simulator.traces import TraceRequest, read_trace, repeated, scaled, summary, synthetic
from pdspec.study.simulator.workers import CountedPool, SimDecode
from pdspec.types import Handoff
from router.policy import choose

TRACES = Path(__file__).resolve().parents[2] / "examples" / "traces"
TIMES = WorkerTimes(
    batches=(1, 2, 4), step_s=(0.010, 0.012, 0.016), kv_token_s=1e-6, chunk_s=0.001, token_s=0.0001, request_s=0.002,
    handoff_s=0.003,
)  # fmt: skip


def one(arrival_s: float = 0.0, prompt: int = 100, output: int = 11) -> TraceRequest:
    return TraceRequest(arrival_s=arrival_s, prompt=prompt, output=output)


def ran(trace, deployment=None, times=TIMES, seed=0):
    simulation = Simulation(deployment or Deployment(), times, seed)
    simulation.run(trace)
    for worker in (*simulation._prefills, *simulation._decodes):
        assert worker.scheduler.pool.free == worker.scheduler.pool.num_pages  # everything was given back
        assert not worker.scheduler.running and not worker.scheduler.waiting
    assert not simulation._tickets and not simulation._places
    return simulation.answers


def test_a_single_request_takes_what_its_parts_take():
    (answer,) = ran([one()])
    assert answer.first == pytest.approx(0.002 + 0.001 + 100 * 0.0001)
    steps = sum(0.010 + 1e-6 * (100 + step) for step in range(10))
    assert answer.done == pytest.approx(answer.first + 0.003 + steps)


def test_a_prompt_is_computed_in_chunks_and_pays_for_its_past():
    times = replace(TIMES, pair_s=1e-6)
    (answer,) = ran([one(prompt=250, output=1)], Deployment(chunk=100), times)
    chunks = sum(0.001 + n * (0.0001 + (start + n / 2) * 1e-6) for start, n in ((0, 100), (100, 100), (200, 50)))
    assert answer.done == answer.first == pytest.approx(0.002 + chunks)


def test_a_second_sequence_joins_at_a_step_boundary_and_both_share_steps():
    times = replace(TIMES, kv_token_s=0.0)
    first, second = ran([one(output=101), one(arrival_s=0.1, output=11)], times=times)
    begun = first.first + 0.003
    joined = second.first + 0.003
    boundary = begun + np.ceil((joined - begun) / 0.010) * 0.010
    assert second.done == pytest.approx(boundary + 10 * 0.012)
    alone = (boundary - begun) / 0.010
    assert first.done == pytest.approx(second.done + (100 - alone - 10) * 0.010)


def test_sequences_wait_for_seats_in_order_of_arrival():
    answers = ran([one(arrival_s=0.001 * n) for n in range(5)], Deployment(max_batch=2))
    assert [a.done for a in answers] == sorted(a.done for a in answers)
    assert answers[2].started >= answers[0].done  # its prefill was not asked for before there was a seat


def test_workers_that_prefill_themselves_hold_up_their_own_steps():
    trace = [one(output=200), one(arrival_s=0.3, prompt=2000, output=5)]
    apart, together = ran(trace), ran(trace, Deployment(prefill=0))
    assert together[0].done > apart[0].done + 0.12


def test_speculation_shortens_answers_by_what_it_accepts():
    times = replace(TIMES, chances=((0.2, 0.3, 0.5),), kv_token_s=0.0)
    (answer,) = ran([one(output=3001)], times=times)
    expected = 0.2 + 2 * 0.3 + 3 * 0.5
    assert answer.verifications == pytest.approx(3000 / expected, rel=0.03)
    assert times.expected_tokens == pytest.approx(expected)
    generator = np.random.default_rng(1)
    assert steps_of(np.array([0.0, 1.0]), 10, generator) == 5 and steps_of(np.array([1.0]), 7, generator) == 7
    assert steps_of(np.array([0.5, 0.5]), 0, generator) == 0


def test_workers_of_one_machine_share_its_cores():
    clock, ended = Clock(), []
    machine = Machine(clock, (1.0, 0.8))
    machine.start(1.0, lambda: ended.append(clock.now))
    clock.at(0.5, lambda: machine.start(1.0, lambda: ended.append(clock.now)) and None)
    clock.run()
    first = 0.5 + 0.5 / 0.8
    assert ended == [pytest.approx(first), pytest.approx(first + (1.0 - 0.8 * (first - 0.5)))]
    assert machine.busy_s == pytest.approx(2.0)


def test_the_policy_chooses_from_a_short_list_what_it_chooses_from_all():
    generator = random.Random(3)
    for case in range(200):
        count = generator.choice((40, 100, 333))
        sides = {}
        for role in ("prefill", "decode"):
            side = Side(role, [None] * count, pages=50)
            side._seen[0] = [generator.choice((0, 0, 0, 1, 3)) for _ in range(count)]
            side._seen[1] = [generator.choice((0, 1, 2, 5)) for _ in range(count)]
            side._seen[2] = [generator.randrange(0, 50) for _ in range(count)]
            side._now[:] = side._seen
            if case % 3 == 0:
                side._seen[1] += 1
            for _ in range(generator.randrange(30)):
                side._sent[generator.randrange(count)] += 1
            sides[role] = side
        tokens = generator.choice((64, 640, 3000))
        every = [sides[role].view(index) for role in ("prefill", "decode") for index in range(count)]
        whole = choose(every, handoff=Handoff.DIRECT, tokens=tokens)
        short = route(sides["prefill"], sides["decode"], tokens, 0.0)
        assert (short.decode, short.prefill[0]) == (whole.decode, whole.prefill[0])


def test_the_router_sees_counts_of_the_last_heartbeat_and_what_it_sent_since():
    clock = Clock()
    worker = SimDecode(
        clock, Machine(clock), TIMES, pages=10, max_batch=4, chunk=100, on_first=lambda a: True,
        on_end=lambda a: None, changed=lambda: None,
    )  # fmt: skip
    side = Side("decode", [worker], pages=10)
    worker.scheduler.pool.allocate(4)
    side.changed(0, 0.05)
    assert side.view(0).info.free_pages == 10  # the next heartbeat has not come
    ticket = side.send(0, 0.1)
    assert side.view(0).load == 1
    side.look(0.2)
    assert side.view(0).info.free_pages == 6 and side.view(0).load == 0  # now the worker's own counts stand for it
    side.close(ticket, 0.25)
    assert side.view(0).pending == -1


def test_a_counted_pool_keeps_books_like_a_page_pool():
    pool = CountedPool(10)
    pages = pool.allocate(7)
    assert pool.free == 3
    with pytest.raises(Exception, match="4 KV pages"):
        pool.allocate(4)
    pool.release(pages)
    assert pool.free == 10


def test_results_say_what_came_too_late_and_what_never_fits():
    trace = [one(arrival_s=0.01 * n, output=50) for n in range(100)] + [one(prompt=10**6)]
    found = simulate(trace, Deployment(max_batch=4), TIMES, goal=Goal(ttft_s=0.05, tpot_s=0.02))
    assert found["requests"] == 100 and found["too_long"] == 1
    assert 0 < found["good_share"] < 0.5
    assert found["ttft_ms"]["p50"] < found["ttft_ms"]["p99"]
    again = simulate(trace, Deployment(max_batch=4), TIMES, goal=Goal(ttft_s=0.05, tpot_s=0.02))
    drop = ("wall_s",)
    assert {k: v for k, v in again.items() if k not in drop} == {k: v for k, v in found.items() if k not in drop}


def test_a_full_deployment_turns_requests_away_as_the_router_does():
    trace = [one(output=10_000) for _ in range(400)]
    found = simulate(trace, Deployment(max_batch=1, kv_tokens=20_000), TIMES)
    assert found["turned_away"] == 400 - 256 and found["requests"] == 256


def test_a_sweep_finds_the_knee_between_too_few_and_too_many_prefill_workers():
    trace = synthetic(rate=20, seconds=20, prompt=800, output=60, seed=1)
    found = sweep(trace, 6, Deployment(max_batch=4), TIMES, Goal(ttft_s=0.5, tpot_s=0.03))
    rates = [row["requests_per_second"] for row in found["rows"]]
    best = rates.index(max(rates))
    assert found["interior"] and found["knee"]["prefill"] == best + 1
    assert rates[0] < 0.9 * max(rates) > rates[-1]
    assert splits(4) == [1, 2, 3] and len(splits(1000)) == 12
    with pytest.raises(ConfigError, match="workers"):
        sweep(trace, 2, Deployment(), TIMES, Goal())


def test_public_traces_are_read():
    mooncake, azure = (read_trace(TRACES / name) for name in ("mooncake-sample.jsonl", "azure-sample.csv"))
    for trace in (mooncake, azure):
        assert trace[0].arrival_s == 0.0 and [r.arrival_s for r in trace] == sorted(r.arrival_s for r in trace)
    first = json.loads((TRACES / "mooncake-sample.jsonl").read_text().splitlines()[0])
    assert mooncake[0].prompt == first["input_length"] and list(mooncake[0].blocks) == first["hash_ids"]
    assert 0.1 < summary(mooncake)["prefix_share"] < 0.9 and summary(azure)["prefix_share"] == 0.0
    assert len(azure) == 80 and 50 < azure[-1].arrival_s < 70


def test_azure_times_keep_their_fractions_and_zones(tmp_path):
    path = tmp_path / "trace.csv"
    lines = ("TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:00.009930+00:00,2162,5",
             "2024-05-10 00:00:01.5099300+00:00,10,0")  # fmt: skip
    path.write_text("\n".join(lines))
    first, second = read_trace(path)
    assert second.arrival_s == pytest.approx(1.5) and (first.prompt, second.output) == (2162, 1)


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"timestamp": 1, "input_length": 0, "output_length": 1}'])
def test_broken_traces_are_refused_with_file_and_line(tmp_path, text):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="trace"):
        read_trace(path)


def test_traces_are_stretched_and_repeated():
    trace = [one(arrival_s=float(n)) for n in range(10)]
    assert scaled(trace, rate=2.0)[-1].arrival_s == 4.5
    longer = repeated(trace, 35.0, times=2)
    assert 65 <= len(longer) <= 70 and longer[-1].arrival_s < 35
    drawn = synthetic(rate=50, seconds=100, prompt=300, output=40, seed=2)
    assert summary(drawn)["prompt_mean"] == pytest.approx(300, rel=0.05)
    assert summary(drawn)["rate"] == pytest.approx(50, rel=0.05)


def test_tables_survive_json_and_broken_ones_are_refused():
    times = replace(TIMES, chances=((0.5, 0.5), (1.0,)), speeds=(1.0, 0.7))
    assert WorkerTimes.from_json(json.loads(json.dumps(times.to_json()))) == times
    assert TIMES.step(3, 0) == pytest.approx(0.014) and TIMES.step(6, 10) == pytest.approx(0.020 + 1e-5)
    with pytest.raises(ConfigError, match="times"):
        WorkerTimes.from_json({"batches": [1]})
