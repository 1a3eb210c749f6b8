"""The stack of plain processes that checks and benchmarks run against: answers like one process, leaves nothing."""

from __future__ import annotations

import socket
import time

import pytest

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError
from pdspec.study.stack import Stack
from pdspec.types import GenerateRequest, SamplingParams, UserRequest

CONFIG = WorkerConfig(model="tiny", heads={"eagle3": "random:0"}, cache_tokens=4096, threads=1, chunk=16)
PARAMS = SamplingParams(max_tokens=24, seed=3, temperature=0.7, ignore_eos=True)


def test_a_stack_answers_as_one_process_does_and_ends_whole():
    local = LocalGenerator(CONFIG)
    request = GenerateRequest(request_id="r", prompt_ids=tuple(range(50)), sampling=PARAMS)
    expected = tuple(token for chunk in local.generate(request) for token in chunk.token_ids)
    local.resources.close()
    with Stack(CONFIG) as stack:
        with RouterClient(stack.endpoint) as client:
            for handoff in ("direct", "relay"):
                answer = client.generate(UserRequest(prompt_ids=tuple(range(50)), sampling=PARAMS, handoff=handoff))
                assert answer.token_ids == expected and answer.stats.handoff == handoff
                assert answer.stats.kv_bytes > 0 and answer.stats.draft_kv_bytes > 0
            first = client.generate(UserRequest(prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=1)))
            assert len(first.token_ids) == 1 and first.stats.kv_bytes == 0
        processes = list(stack.processes.values())
        port = int(stack.endpoint.rsplit(":", 1)[1])
    assert all(process.poll() is not None for process in processes)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_worker_that_cannot_start_says_why():
    with pytest.raises(ConfigError, match="no eagle3 head"), Stack(CONFIG.replace(heads={})):
        pass


def test_the_second_turn_of_a_chat_goes_where_its_cache_is():
    """Two decode workers, chats whose turns are shuffled: at least 90 % of the tokens that could be found are."""
    possible = hit = 0
    with Stack(CONFIG, decode=2) as stack, RouterClient(stack.endpoint) as client:
        ask = lambda ids: client.generate(UserRequest(prompt_ids=ids, sampling=PARAMS, drafter="eagle3"))  # noqa: E731
        prompts = [tuple((7 * i * i + 31 * chat + i) % 256 for i in range(48)) for chat in range(6)]
        answers = [ask(ids) for ids in prompts]
        assert len({answer.stats.decode_worker for answer in answers}) == 2, "load alone spreads the first turns"
        time.sleep(1.0)  # heartbeats
        for ids, answer in [*zip(prompts, answers, strict=True)][::-1]:
            possible += (len(ids) + len(answer.token_ids)) // 16 * 16
            second = ask((*ids, *answer.token_ids, 1, 2, 3))
            hit += second.stats.cached_tokens
            assert second.stats.decode_worker == answer.stats.decode_worker
    assert hit >= 0.9 * possible, (hit, possible)
