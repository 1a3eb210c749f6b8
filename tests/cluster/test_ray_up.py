"""Deployments over several machines in one box (``machines.py``), with the commands that an operator types: `ray up`
from ``deploy/cluster-local.yaml``, and a Ray of two nodes one of which is lost. The tiny model; real ssh, Ray, gRPC."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from machines import HOME, REPOSITORY, Machine, machines, missing

pytestmark = [
    pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing()), reason=f"no machines can be made here: {missing()}"),
]  # fmt: skip
TINY = "--model tiny --drafter ngram --head eagle3=random:1 --threads 1"
PORT = 50051
NOTICE_S = 3.0
WAIT_S = 300.0  # for anything that is bound by how busy the real machine is
RAY_TRIES = 4  # Ray gives itself 30 s to start, which is short on a busy machine
NEW_RAY = (
    "ray stop > /dev/null; export RAY_AUTH_MODE=token RAY_worker_niceness=0 RAY_health_check_period_ms=500"
    " RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3;"
    " ray start --disable-usage-stats --object-store-memory=100000000"
)

# Prints a line whenever the states of the workers change, with the time.
WATCH = f"""
import json, sys, time
from pdspec.client import RouterClient
last = None
with RouterClient(sys.argv[1] + ":{PORT}") as client:
    while True:
        found = {{worker["worker_id"]: worker["state"] for worker in client.workers()}}
        if found != last:
            print(json.dumps([time.time(), found]), flush=True)
        last = found
        time.sleep(0.05)
"""


@pytest.fixture
def lab(tmp_path, request) -> Iterator[dict[str, Machine]]:
    with machines(tmp_path, request.param) as made:
        yield made


@pytest.mark.parametrize("lab", [("head", "first", "second")], indirect=True)
def test_ray_up_answers_and_leaves_nothing(lab):
    """`ray up`, `pdspec up`, a request from another machine, and the way down, as the file's first lines say."""
    here, head = lab["lab"], lab["head"]
    before = {name: machine.files("/tmp", "/dev/shm", HOME) for name, machine in lab.items()}
    write(here, "cluster.yaml", cluster_file(lab))
    sh(here, "ray get-auth-token --generate")
    sh(here, "ray up -y cluster.yaml", RAY_TRIES)
    for name in ("first", "second"):
        wait(lambda name=name: any("raylet/raylet" in line for line in lab[name].processes().values()), name)
    up = f"pdspec up --config ~/pdspec/deploy/pdspec-local.yaml --detach --decode 1 --host {head.address} {TINY}"
    told = sh(here, f"ray exec cluster.yaml '{up} --set start_timeout_s={WAIT_S:g}'")
    assert f"ready {head.address}:{PORT}" in told

    answer = generate(here, head.address)
    assert len(answer["token_ids"]) == 8 and answer["kv_bytes"] > 0
    assert places(here, head.address) == {"prefill-0": lab["first"].address, "decode-0": lab["second"].address}

    sh(here, f"{sys.executable} ~/pdspec/deploy/down-local.py cluster.yaml")
    for name, machine in lab.items():
        wait(lambda machine=machine: not machine.processes() and not machine.ports(), f"the end of {name}")
        kept = {file for file in machine.files("/tmp", "/dev/shm", HOME) - before[name]
                if "/.cache/pdspec/" not in file}  # fmt: skip
        assert kept == ({f"{HOME}/cluster.yaml", f"{HOME}/.ray/auth_token"} if name == "lab" else set()), name
        assert not machine.files(f"{HOME}/.cache/pdspec/run"), name


@pytest.mark.parametrize("lab", [("head", "worker")], indirect=True)
def test_a_lost_node_is_noticed_and_replaced(lab):
    """Prefill on the head, decode on the other node, by label. That node loses power; a new one takes its place."""
    here, head, worker = lab["lab"], lab["head"], lab["worker"]
    for machine in (head, worker):
        write(machine, ".ray/auth_token", "0123456789abcdef" * 4)
    sh(head, f"{NEW_RAY} --head --port=6379 --include-dashboard=false --labels=pdspec-role=prefill", RAY_TRIES)
    join = f"{NEW_RAY} --address={head.address}:6379 --labels=pdspec-role=decode"
    sh(worker, join, RAY_TRIES)
    quiet = head.ports()
    labels = "--set prefill_labels=pdspec-role=prefill --set decode_labels=pdspec-role=decode"
    up = f"pdspec up --address auto --host {head.address} --detach {labels} --set start_timeout_s={WAIT_S:g} {TINY}"
    assert sh(head, up).strip().endswith(f"ready {head.address}:{PORT}")
    assert places(here, head.address) == {"prefill-0": head.address, "decode-0": worker.address}
    expected = generate(here, head.address)["token_ids"]

    with watching(here, head.address) as told:
        wait(lambda: told() and told()[-1][1].get("decode-0") == "ready", "the watch")
        began = time.time()
        worker.kill()
        wait(lambda: told()[-1][1].get("decode-0") != "ready", "the loss")
        noticed = told()[-1][0] - began
    print(f"noticed after {noticed:.2f} s")
    assert 0 < noticed <= NOTICE_S

    worker.start()
    worker.link(here)
    write(worker, ".ray/auth_token", "0123456789abcdef" * 4)
    sh(worker, join, RAY_TRIES)
    wait(lambda: generate(here, head.address, check=False).get("token_ids") == expected, "an answer")
    assert places(here, head.address)["decode-0"] == worker.address

    sh(head, "pdspec down")
    for machine in (head, worker):
        wait(lambda machine=machine: not ours(machine), f"the end of pdspec on {machine.name}: {ours(machine)}")
        assert not machine.files("/dev/shm"), machine.name
        assert not machine.files(f"{HOME}/.cache/pdspec/run"), machine.name
    wait(lambda: not head.ports() - quiet, f"closed ports: {head.ports() - quiet}")


def cluster_file(lab: dict[str, Machine]) -> str:
    """deploy/cluster-local.yaml with these machines' addresses, user and key; its commands as they are."""
    text = (REPOSITORY / "deploy" / "cluster-local.yaml").read_text()
    config = yaml.safe_load(text.replace("192.0.2.11 ", f"{lab['first'].address} "))
    config["provider"].update(head_ip=lab["head"].address, worker_ips=[lab[n].address for n in ("first", "second")])
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/key"}
    return yaml.safe_dump(config)


def write(machine: Machine, name: str, text: str) -> None:
    path = Path(f"/proc/{machine.init}/root{HOME}/{name}")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def sh(machine: Machine, command: str, tries: int = 1) -> str:
    """What ``command`` prints on ``machine``; fails with its errors."""
    for left in reversed(range(tries)):
        done = machine.run("bash", "-c", command, timeout=2 * WAIT_S)
        if done.returncode == 0:
            return done.stdout
        print(f"{machine.name}: {command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{left} tries are left")
    pytest.fail(f"{machine.name}: {command}: exit status {done.returncode}")


def generate(machine: Machine, router: str, check: bool = True) -> dict:
    """One request over gRPC, from ``machine``."""
    asked = "pdspec generate hello --json --max-tokens 8 --ignore-eos --endpoint"
    done = machine.run("bash", "-c", f"{asked} {router}:{PORT}", timeout=WAIT_S)
    assert done.returncode == 0 or not check, done.stderr
    return json.loads(done.stdout) if done.returncode == 0 else {}


def places(machine: Machine, router: str) -> dict[str, str]:
    """Host of each worker by its id, as the router has them."""
    seen = json.loads(sh(machine, f"pdspec top --once --json --endpoint {router}:{PORT}"))
    return {worker["worker_id"]: worker["address"].rpartition(":")[0] for worker in seen["workers"]}


def ours(machine: Machine) -> list[str]:
    """Processes of pdspec, Ray's own apart."""
    rays = ("ray/core/src", "site-packages/ray")
    return [line for line in machine.processes().values() if "pdspec" in line and not any(ray in line for ray in rays)]


def wait(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not check():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def watching(machine: Machine, router: str) -> Iterator[Callable[[], list[list]]]:
    """Runs WATCH on ``machine``; gives a function that returns what it has printed."""
    command = machine.command("setpriv", "--pdeathsig", "KILL", sys.executable, "-c", WATCH, router)
    with subprocess.Popen(command, env=machine.environment(), stdout=subprocess.PIPE, text=True) as process:
        lines: list[list] = []
        reader = threading.Thread(target=lambda: lines.extend(map(json.loads, process.stdout)), daemon=True)
        reader.start()
        try:
            yield lambda: lines
        finally:
            process.kill()
            reader.join(10)
