"""Workers of several ranks: handoffs between all degrees, and what a rank that dies ends."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from typer.testing import CliRunner

import decode_worker.service
import prefill_worker.service
from pdspec.cli.app import build_app
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError
from pdspec.parallel.cache import ShardedCache
from pdspec.parallel.group import RankLost
from tests.parity.roles import TINY, Roles, held_by, request, running, wait_until
from tests.rank_threads import RankThread

FAST = {
    **TINY, "dtype": "float32", "numerics": "fast", "drafters": ("none", "ngram", "eagle3", "draft_model"),
    "heads": {"eagle3": "random:0", "draft_model": "tiny"},
}  # fmt: skip
CASES = [
    ("none", "", "prefill"), ("ngram", "chain(3)", "prefill"), ("eagle3", "dynamic(3,3,6)", "prefill"),
    ("eagle3", "chain(2)", "decode"), ("draft_model", "static(2x2)", "prefill"),
]  # fmt: skip


@pytest.fixture(scope="module")
def local():
    generator = LocalGenerator(WorkerConfig(**FAST))
    yield generator
    generator.resources.close()


@contextmanager
def roles_of(local: LocalGenerator, prefill: int, decode: int):
    """Both workers; the ranks are threads, the pages of both sides differ in size."""
    p = prefill_worker.service.launch(WorkerConfig(**{**FAST, "tp": prefill, "page_size": 8}), RankThread)
    d = decode_worker.service.launch(
        WorkerConfig(**{**FAST, "tp": decode, "prefix_cache": "all", "role": "decode"}), RankThread
    )
    try:
        yield Roles(p, d, local)
        for worker in (p, d):
            assert wait_until(lambda worker=worker: held_by(worker) == 0, 5.0)
            assert worker.alive()
    finally:
        d.stop()
        p.stop()


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (2, 2)])
def test_any_degrees_give_the_tokens_and_drafts_of_one_rank(local, prefill, decode):
    asked = [
        request(drafter, tree, n=30 + 5 * i, seed=i + 9 * (t > 0), draft_prefill=side,
                sampling={"temperature": t, "max_tokens": 12})
        for i, (drafter, tree, side) in enumerate(CASES) for t in (0.0, 0.8)
    ]  # fmt: skip
    accepted = 0
    with roles_of(local, prefill, decode) as roles:
        for one, answer in zip(asked, roles.ask(*asked), strict=True):
            alone = roles.ask_local(one)
            assert (answer.tokens, answer.traces) == (alone.tokens, alone.traces), one.drafter
            assert answer.stats.draft_rebuilds == answer.stats.prefill_retries == 0
            assert answer.stats.kv_bytes == len(one.prompt_ids) * 4 * local.resources.runner.group.row_bytes
            accepted += answer.stats.accepted_tokens
        (again,) = roles.ask(asked[4])  # what the decode worker kept serves: the last page of it is copied
        assert again.tokens == roles.ask_local(asked[4]).tokens and again.stats.cached_tokens > 0
    assert accepted > 10  # of the draft model, which is the target


def test_both_sides_must_be_fast(local):
    with running(prefill={"tp": 2, "numerics": "auto"}, decode={"numerics": "exact"}, **FAST) as roles:
        with pytest.raises(Exception, match="fingerprint.numerics"):
            roles.ask(request("none", sampling={"max_tokens": 4}))


def test_a_killed_rank_ends_its_worker():
    """Idle or at work: the rank is a process of its own."""
    config = WorkerConfig(**{**FAST, "drafters": ("none",), "heads": {}, "drafter": "none", "tp": 2})
    worker = decode_worker.service.launch(config)
    host = worker.engine.host
    (rank,) = host.resources.ranks.started
    folder = host.resources.ranks.folder
    try:
        assert worker.alive() and not folder.exists()  # a crash has nothing to leave
        os.kill(rank.process.pid, signal.SIGKILL)
        assert wait_until(lambda: not worker.alive(), 5.0)
        asked = request("none")
        with pytest.raises(RankLost):
            worker.engine.post(lambda: list(LocalGenerator(resources=host.resources).generate(asked))).result(20)
    finally:
        worker.stop()
    assert rank.process.poll() == -signal.SIGKILL


@pytest.mark.parametrize("mixed_up", [False, True])
def test_the_check_sees_heads_that_are_mixed_up(monkeypatch, mixed_up):
    real = ShardedCache.row_views

    def reversed_heads(self, group, *rest):
        views = real(self, group, *rest)
        return tuple(np.asarray(v)[:, :, ::-1].copy().data for v in views) if group == "target" else views

    if mixed_up:
        monkeypatch.setattr(ShardedCache, "row_views", reversed_heads)
    asked = "check tp --model tiny --num-prompts 1 --max-tokens 8 --drafters none --json"
    ran = CliRunner().invoke(build_app(), asked.split())
    found = json.loads(ran.stdout)
    assert (ran.exit_code, found["ok"]) == ((1, False) if mixed_up else (0, True))
    (case,) = found["cases"]
    assert (case["unaudited"] > 0) == mixed_up and 0 < case["tau"] < 1e-3


def test_a_rank_that_cannot_start_is_said_at_once():
    class Dead:
        def __init__(self, folder, rank):
            pass

        def alive(self):
            return False

        def stop(self):
            pass

    with pytest.raises(ConfigError, match="did not start"):
        prefill_worker.service.launch(WorkerConfig(**{**FAST, "tp": 2}), Dead)
