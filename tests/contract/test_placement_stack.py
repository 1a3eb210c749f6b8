"""``prefill_choice: measured`` in a whole deployment: under the same load the throttle of a link alone flips it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from pdspec.client import Answer, RouterClient
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.study.stack import Stack
from pdspec.types import LINK_RATE, GenerateRequest, SamplingParams, UserRequest

CONFIG = WorkerConfig(
    model="tiny", drafter="none", drafters=("none",), cache_tokens=1 << 16, threads=1, chunk=512, prefix_cache="off"
)
LONG, SHORT, ANSWERS = 1800, 512, 12
THROTTLE = 6e4  # bytes per second: a long prompt's KV takes ten seconds
PARAMS = SamplingParams(max_tokens=4, seed=3, ignore_eos=True)


def ids(count: int, salt: int) -> tuple[int, ...]:
    return tuple((7 * i * i + 31 * salt + i) % 256 for i in range(count))


def ask(client: RouterClient, prompt: tuple[int, ...]) -> Answer:
    return client.generate(UserRequest(prompt_ids=prompt, sampling=PARAMS))


@contextmanager
def answers_under_way(client: RouterClient) -> Iterator[None]:
    """That many long answers are being decoded."""
    endless = SamplingParams(max_tokens=1900, seed=1, ignore_eos=True)
    with ExitStack() as stack:
        for salt in range(ANSWERS):
            chunks = client.stream(UserRequest(prompt_ids=ids(8, salt), sampling=endless))
            stack.callback(chunks.close)
            next(chunks)
        time.sleep(1.0)  # heartbeats
        yield


@pytest.mark.parametrize("limit", [0.0, THROTTLE])
def test_a_throttled_link_flips_the_choice(limit):
    local = LocalGenerator(CONFIG)
    asked = GenerateRequest(request_id="r", prompt_ids=ids(LONG, 5), sampling=PARAMS)
    expected = tuple(token for chunk in local.generate(asked) for token in chunk.token_ids)
    local.resources.close()
    changes = {"prefill_changes": {"link_limit": limit}, "router_changes": {"prefill_choice": "measured"}}
    with Stack(CONFIG, **changes) as stack, RouterClient(stack.endpoint) as client:
        assert ask(client, ids(SHORT, 1)).stats.handoff == "direct", "nothing is known of the link: it is measured"
        with answers_under_way(client):
            figures = next(worker for worker in client.workers() if worker["role"] == "decode")["metrics"]
            rate = figures[LINK_RATE + stack.addresses["prefill"][0]]
            assert rate == pytest.approx(limit, rel=0.5) if limit else rate > 3 * THROTTLE
            answer = ask(client, ids(LONG, 5))
            print({name: value for name, value in figures.items() if "per_second" in name or "link" in name})
        assert answer.token_ids == expected
        assert answer.stats.handoff == ("none" if limit else "direct")
        assert bool(answer.stats.kv_bytes) == (not limit)
