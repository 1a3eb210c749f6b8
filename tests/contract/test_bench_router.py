"""The bench of the router against workers that compute nothing, and the client that times many answers."""

from __future__ import annotations

import pytest

from pdspec.client import RouterClient
from pdspec.errors import InvalidRequest
from pdspec.study import bench_router
from pdspec.study.load import Load
from pdspec.study.processes import process
from pdspec.types import SamplingParams, UserRequest


def test_every_chunk_is_passed_on_and_counted():
    found = bench_router.run(
        model="tiny", streams=3, chunks=20, prompt_tokens=16, requests=3, runs=1, progress=lambda text: None
    )
    assert found["chunks"]["messages_per_chunk"] == 1.0
    assert found["chunks"]["router_cpu_us"] > 0 and found["first_token"]["router_cpu_us"] > 0
    assert [floor["name"] for floor in found["floors"]] == ["added_ttft_ms", "chunks_per_second"]
    assert found["ok"] == all(floor["ok"] for floor in found["floors"])


@pytest.fixture(scope="module")
def endpoint():
    with process("pdspec.study.fake_worker") as worker:
        with process("router", "--port", "0", "--model", "tiny", "--decode", worker.address) as router:
            with RouterClient(router.address) as client:
                client.wait_ready()
            yield router.address


def asked(tokens: int) -> UserRequest:
    return UserRequest(prompt_ids=(7, 8), drafter="none", sampling=SamplingParams(max_tokens=tokens, ignore_eos=True))


def test_answers_are_timed_piece_by_piece(endpoint):
    with Load(endpoint) as load:
        first, second = load.run([asked(5), asked(9)], [0.0, 0.2])
    assert [len(one.token_ids) for one in (first, second)] == [5, 9]
    assert len(second.times) == 9 and list(second.times) == sorted(second.times)
    assert first.complete and first.stats.output_tokens == 5
    assert second.asked - first.asked >= 0.2 and 0 < second.ttft_s <= second.done_s


def test_long_answers_are_left_when_the_others_are_done(endpoint):
    with Load(endpoint) as load:
        long, short = load.run([asked(500_000), asked(4)], [0.0, 0.1], until=1)
    assert short.complete and len(short.token_ids) == 4
    assert not long.complete and 0 < len(long.token_ids) < 500_000
    assert long.times[-1] >= short.times[-1]


def test_an_error_ends_them_all(endpoint):
    with Load(endpoint) as load, pytest.raises(ExceptionGroup) as raised:
        load.run([asked(500_000), UserRequest(prompt_ids=(), sampling=SamplingParams())])
    assert raised.group_contains(InvalidRequest)
