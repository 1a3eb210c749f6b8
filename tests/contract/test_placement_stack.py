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
from pdspec.types import LINK_RATE, GenerateRequest, SamplingParams, UserRequest, WorkerInfo
from router.placement import estimate

CONFIG = WorkerConfig(
    model="tiny", drafter="none", drafters=("none",), cache_tokens=1 << 16, threads=1, chunk=64, prefix_cache="off",
    stall_timeout_s=300,
)
LONG, ANSWERS = 1800, 24
TRANSFER = 4.0  # times what the decode worker would take, waits of its answers counted: the throttled link
PARAMS = SamplingParams(max_tokens=4, seed=3, ignore_eos=True)
PATIENT = {"prefill_choice": "measured", "lost_after_s": 20, "stall_s": 60}  # of a busy machine
Figures = dict[str, float]


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


def placed(limit: float, size: int) -> tuple[Answer, Figures, str]:
    """A long prompt's answer while others are decoded, and what the decode worker told before, with the link's name;
    a prompt of ``size`` tokens measures it."""
    with Stack(CONFIG, prefill_changes={"link_limit": limit}, router_changes=PATIENT) as stack:
        with RouterClient(stack.endpoint) as client:
            assert ask(client, ids(size, 1)).stats.handoff == "direct", "nothing is known of the link: it is measured"
            with answers_under_way(client):
                figures = next(worker for worker in client.workers() if worker["role"] == "decode")["metrics"]
                return ask(client, ids(LONG, 5)), figures, LINK_RATE + stack.addresses["prefill"][0]


def seconds_here(figures: Figures) -> float:
    """What the policy makes of these figures."""
    info = WorkerInfo(worker_id="", role="", address="", model="", fingerprint="", metrics=figures)
    found = estimate(info, info, link="", missing=LONG, computed=LONG, running=ANSWERS, waiting_tokens=0).here
    assert found is not None
    return found


def test_a_throttled_link_flips_the_choice():
    local = LocalGenerator(CONFIG)
    asked = GenerateRequest(request_id="r", prompt_ids=ids(LONG, 5), sampling=PARAMS)
    expected = tuple(token for chunk in local.generate(asked) for token in chunk.token_ids)
    local.resources.close()
    free, figures, link = placed(0.0, 1000)
    limit = LONG * figures["handoff_bytes_per_token"] / (TRANSFER * seconds_here(figures))
    assert figures[link] > 2 * limit
    throttled, slow, link = placed(limit, 256)
    assert slow[link] == pytest.approx(limit, rel=0.6)
    assert (free.stats.handoff, throttled.stats.handoff) == ("direct", "none"), (figures, slow)
    print({name: value for name, value in figures.items() if "second" in name}, slow[link])
    assert free.stats.kv_bytes > 0 == throttled.stats.kv_bytes
    assert free.token_ids == throttled.token_ids == expected
