"""A worker of several ranks under Ray: placed on one node, answering, ended and started anew with its ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import ray

from pdspec.client import RouterClient
from pdspec.cluster import start_cluster
from pdspec.config import ClusterConfig, RouterConfig, WorkerConfig
from pdspec.types import SamplingParams, UserRequest

pytestmark = pytest.mark.cluster
WORKER = WorkerConfig(model="tiny", dtype="float32", drafter="ngram", drafters=("none", "ngram"), threads=1,
                      cache_tokens=4096)  # fmt: skip


def ranks() -> list[int]:
    """Processes of RankActor that live."""
    parents = {int(path.parent.name): _parent(path) for path in Path("/proc").glob("[0-9]*/stat")}
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return [pid for pid in mine if b"RankActor" in _read(Path(f"/proc/{pid}/cmdline"))]


def _parent(stat: Path) -> int:
    return int((_read(stat).rpartition(b")")[2].split() or [0, 0])[1])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def test_ranks_under_ray_answer_and_come_back_after_one_died():
    config = ClusterConfig(worker=WORKER, prefill_worker={"tp": 2}, router=RouterConfig(port=0), cpus_per_worker=0.5)
    asked = UserRequest(prompt_ids=tuple(range(40, 80)), sampling=SamplingParams(max_tokens=8, seed=1, ignore_eos=True))
    with start_cluster(config) as cluster:
        with RouterClient(cluster.endpoint) as client:
            first = client.generate(asked)
            assert len(first.token_ids) == 8 and first.stats.prefill_worker == "prefill-0"
            assert len(cluster._groups) == 2 and cluster._groups[1].bundle_specs == [{"CPU": 0.25}] * 2
            (rank,) = ranks()
            os.kill(rank, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while not set(ranks()) - {rank}:
                assert time.monotonic() < deadline, "the worker and its ranks did not come back"
                time.sleep(0.2)
            client.wait_ready(workers=2, timeout_s=60)
            assert client.generate(asked).token_ids == first.token_ids
    assert not ray.is_initialized() and not ranks()
