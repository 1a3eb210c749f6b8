"""``pdspec drain`` and ``pdspec scale`` on real processes: workers change sides, and answers stay what they are."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import pytest

from pdspec.cli import app
from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.study.stack import Stack
from pdspec.types import SamplingParams, UserRequest
from tests.parity.roles import wait_until

CONFIG = WorkerConfig(model="tiny", heads={"eagle3": "random:0"}, cache_tokens=8192, threads=1, chunk=16)
ASK = UserRequest(prompt_ids=tuple(range(50)), sampling=SamplingParams(max_tokens=24, seed=3, ignore_eos=True))
LONG = UserRequest(prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=1500, seed=3, ignore_eos=True))


@pytest.fixture(scope="module")
def stack():
    with Stack(CONFIG, prefill=2, decode=1) as stack:
        yield stack


@pytest.fixture
def client(stack):
    with RouterClient(stack.endpoint) as client:
        yield client


def run(monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pdspec", *argv])
    status = 0
    try:
        app.main()
    except SystemExit as end:
        status = int(end.code or 0)
    found = capsys.readouterr()
    return status, found.out, found.err


def roles(client) -> list[str]:
    return sorted(entry["role"] for entry in client.workers() if entry["state"] == "ready")


def test_a_worker_is_sent_to_the_other_role_and_back(monkeypatch, capsys, stack, client):
    expected = client.generate(ASK).token_ids
    for role, after in (("decode", ["decode", "decode", "prefill"]), ("prefill", ["decode", "prefill", "prefill"])):
        argv = "drain", "prefill-1", "--role", role, "--endpoint", stack.endpoint
        status, out, _ = run(monkeypatch, capsys, *argv)
        assert status == 0 and out.startswith(f"prefill-1 serves {role} after ")
        assert roles(client) == after
        assert client.generate(ASK).token_ids == expected


@pytest.mark.parametrize("argv, named", [
    (("drain", "nobody"), "prefill-0, prefill-1, decode-0"), (("drain", "prefill-1", "--role", "router"), "--role"),
    (("scale", "--policy", "guess"), "--policy"), (("scale", "--json"), "--once"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(monkeypatch, capsys, stack, argv, named):
    status, out, err = run(monkeypatch, capsys, *argv, "--endpoint", stack.endpoint)
    assert status == 2 and not out and named in err


def test_a_look_at_an_idle_deployment_advises_nothing(monkeypatch, capsys, stack, client):
    client.generate(ASK)
    argv = "scale", "--once", "--json", "--interval", "0.3", "--endpoint", stack.endpoint
    status, out, _ = run(monkeypatch, capsys, *argv)
    seen = json.loads(out)
    assert status == 0 and seen["advice"] is None and seen["requests"] == 0
    assert [len(seen[role]["workers"]) for role in ("prefill", "decode")] == [2, 1]
    assert seen["decode"]["tpot_s"] > 0 and seen["prefill"]["pressure"] == seen["decode"]["pressure"] == 0.0


def test_a_role_that_is_too_slow_gets_a_worker_of_the_other(stack, client):
    """A goal that no decode worker reaches, while prefill workers are idle."""
    over = threading.Event()

    def keep_busy() -> None:
        with RouterClient(stack.endpoint) as own:
            while not over.is_set():
                own.generate(LONG)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    command = [sys.executable, "-m", "pdspec", "scale", "--policy", "switch", "--interval", "0.1", "--patience", "2",
               "--cooldown-s", "600", "--tpot", "0.0001", "--endpoint", stack.endpoint]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as scaling:
        try:
            assert wait_until(lambda: roles(client) == ["decode", "decode", "prefill"], seconds=60)
        finally:
            over.set()
            scaling.send_signal(signal.SIGTERM)
            out, err = scaling.communicate(timeout=20)
            busy.join(60)
    assert "to decode: decode pressure" in out, (out, err)
    assert client.generate(ASK).stats.decode_worker
