"""The stack of plain processes that checks and benchmarks run against: answers like one process, leaves nothing."""

from __future__ import annotations

import socket

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
