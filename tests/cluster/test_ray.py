"""A whole deployment under real Ray, on two nodes in one box: the prefill worker on one, the decode worker on the
other, real gRPC between them, the tiny model on both."""

from __future__ import annotations

import os
import signal
import time

import pytest
import ray
from ray.cluster_utils import Cluster as RayNodes
from ray.util import placement_group_table

from pdspec.cli.local import LocalModel
from pdspec.client import RouterClient, collect
from pdspec.cluster import Cluster, start_cluster
from pdspec.config import ClusterConfig, RouterConfig, WorkerConfig
from pdspec.errors import ConfigError, PdspecError, PeerLost, UnknownName
from pdspec.placement import share
from pdspec.types import SamplingParams, UserRequest
from pdspec.wire.doors import ask_to_drain
from pdspec.wire.trust import Trust

pytestmark = pytest.mark.cluster
WORKER = WorkerConfig(
    model="tiny", drafter="eagle3", heads={"eagle3": "random:1"}, cache_tokens=8192, threads=1, log_level="debug"
)
RESTART_S = 60.0
SETTINGS = ClusterConfig(
    prefill=1, decode=1, worker=WORKER, router=RouterConfig(port=0, heartbeat_s=0.1), cpus_per_worker=0.5,
    prefill_resources={"left": 0.5}, decode_resources={"right": 0.5},
)  # fmt: skip


@pytest.fixture(scope="module")
def nodes():
    common = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = RayNodes(initialize_head=True, head_node_args={**common, "resources": {"left": 1}})
    nodes.add_node(**{**common, "resources": {"right": 1}})
    ray.init(address=nodes.address, namespace="pdspec-test", log_to_driver=False, logging_level="error")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def cluster(nodes):
    with start_cluster(SETTINGS) as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with RouterClient(cluster.endpoint) as client:
        client.wait_ready(workers=2, timeout_s=RESTART_S)
        yield client


@pytest.fixture(scope="module")
def reference():
    """The same requests in one process, without drafter."""
    return LocalModel(WORKER.replace(drafter="none", drafters=("none",), heads={}))


def request(drafter: str, handoff: str = "direct", **sampling) -> UserRequest:
    params = SamplingParams(**{"max_tokens": 24, "seed": 11, "ignore_eos": True, **sampling})
    return UserRequest(text="one two three one two three one two", sampling=params, drafter=drafter, handoff=handoff)


def test_roles_stand_on_nodes_of_their_own(cluster):
    placed = placement_group_table(cluster._groups[0])["bundles_to_node_id"]
    assert len(set(placed.values())) == 2
    assert len(set(cluster.process_ids().values())) == 4  # prefill, decode, router, relay


@pytest.mark.parametrize("handoff", ["direct", "relay"])
@pytest.mark.parametrize("drafter", ["none", "ngram", "eagle3"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_answers_are_those_of_one_process(client, reference, handoff, drafter, sampling):
    answer = client.generate(request(drafter, handoff, **sampling))
    expected = collect(reference.stream(request("none", **sampling)))
    assert answer.token_ids == expected.token_ids and answer.text == expected.text
    stats = answer.stats
    assert (stats.prefill_worker, stats.decode_worker, stats.handoff) == ("prefill-0", "decode-0", handoff)
    assert stats.kv_bytes > 0 and (stats.draft_kv_bytes > 0) == (drafter == "eagle3")


def test_cancelled_requests_leave_no_pages(client):
    for _ in range(3):
        stream = client.stream(request("eagle3", max_tokens=400))
        next(stream)
        stream.close()
    deadline = time.monotonic() + 1.5  # one second, and a heartbeat to hear of it
    while time.monotonic() < deadline:
        held = [worker["total_pages"] - worker["free_pages"] for worker in client.workers()]
        if held == [0, 0]:
            return
        time.sleep(0.05)
    pytest.fail(f"pages still held: {held}")


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "router"])
def test_a_killed_process_comes_back(cluster, client, victim):
    """Ray starts it anew, it finds its place again, and the endpoint stays the same."""
    expected = client.generate(request("eagle3")).token_ids
    old = cluster.process_ids()[victim]
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + RESTART_S
    while True:
        try:
            assert client.generate(request("eagle3"), timeout_s=30).token_ids == expected
            if cluster.process_ids()[victim] != old:
                break
        except (PdspecError, ray.exceptions.RayActorError):
            assert time.monotonic() < deadline, f"{victim} did not come back"
            time.sleep(0.2)
    assert {worker["role"] for worker in client.workers() if worker["state"] == "ready"} == {"prefill", "decode"}


def test_a_worker_switches_its_role_and_back_in_the_same_process(cluster, client):
    expected, old = client.generate(request("eagle3")).token_ids, cluster.process_ids()["prefill-0"]
    (address,) = [worker["address"] for worker in client.workers() if worker["role"] == "prefill"]
    for role in ("decode", "prefill"):
        ask_to_drain(address, role, 1.0, Trust())
        _await_state(client, address, role)
        assert client.generate(request("eagle3"), timeout_s=30).token_ids == expected
    assert cluster.process_ids()["prefill-0"] == old


def test_a_drained_worker_is_started_anew_and_its_answer_moves(cluster, client):
    expected, old = client.generate(request("eagle3", max_tokens=300)).token_ids, cluster.process_ids()["decode-0"]
    (address,) = [worker["address"] for worker in client.workers() if worker["role"] == "decode"]
    stream = client.stream(request("eagle3", max_tokens=300), timeout_s=RESTART_S)
    first = next(stream)
    ask_to_drain(address, "", 0.0, Trust())
    answer = collect([first, *stream])
    assert answer.token_ids == expected
    client.wait_ready(workers=2, timeout_s=RESTART_S)
    assert cluster.process_ids()["decode-0"] != old


def _await_state(client, address, role):
    deadline = time.monotonic() + RESTART_S
    while not any((w["address"], w["role"], w["state"]) == (address, role, "ready") for w in client.workers()):
        assert time.monotonic() < deadline, client.workers()
        time.sleep(0.05)


def test_prefill_killed_in_mid_stream_never_cuts_an_answer(cluster, client):
    expected = client.generate(request("eagle3", max_tokens=300)).token_ids
    stream = client.stream(request("eagle3", max_tokens=300), timeout_s=60)
    first = next(stream)
    os.kill(cluster.process_ids()["prefill-0"], signal.SIGKILL)
    try:
        answer = collect([first, *stream])
    except PeerLost:
        return
    assert answer.token_ids == expected


def test_errors_of_workers_reach_the_caller_and_leave_nothing(nodes):
    before = {actor["actor_id"] for actor in _living_actors()}
    with pytest.raises(UnknownName, match="no model 'tyni'"):
        start_cluster(SETTINGS.replace(worker=WORKER.replace(model="tyni")))
    with pytest.raises(ConfigError, match="no room"):
        start_cluster(SETTINGS.replace(prefill_resources={"left": 2.0}, start_timeout_s=1.0))
    deadline = time.monotonic() + 10
    while {actor["actor_id"] for actor in _living_actors()} - before:
        assert time.monotonic() < deadline, "actors are left"
        time.sleep(0.1)


def test_a_second_deployment_stands_beside_the_first(cluster):
    """Colocated: no prefill worker, the decode worker prefills."""
    config = SETTINGS.replace(prefill=0, decode_resources={"right": 0.4}, cpus_per_worker=0.2)
    second = Cluster(config)
    try:
        second.start()
        with RouterClient(second.endpoint) as client, RouterClient(cluster.endpoint) as first:
            answer = client.generate(request("eagle3"))
            assert answer.token_ids == first.generate(request("none")).token_ids
            assert answer.stats.prefill_worker == answer.stats.decode_worker == "decode-0"
            assert answer.stats.kv_bytes == 0
        processes = second.process_ids().values()
    finally:
        second.stop()
    deadline = time.monotonic() + 10
    while any(_runs(process) for process in processes):
        assert time.monotonic() < deadline, "a process outlived stop()"
        time.sleep(0.1)
    second.stop()  # a second call does nothing


@pytest.mark.parametrize(
    ("amounts", "ranks", "expected"),
    [
        ([1], [1, 1], 0.5), ([0, 1], [1] * 3, 0.3333), ([1, 1], [1] * 3, 0.5), ([4], [1, 1], 1), ([], [1, 1], 0),
        ([0], [1], 0), ([8, 8], [1] * 3, 1), ([2, 2], [1, 2], 1), ([3, 1], [2, 2], 0.5), ([3], [2, 1], 1),
    ],
)  # fmt: skip
def test_share_of_devices(amounts, ranks, expected):
    assert share(amounts, ranks) == expected


def _living_actors() -> list[dict]:
    from ray._private.state import actors

    return [{"actor_id": key} for key, actor in actors().items() if actor["State"] != "DEAD"]


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
