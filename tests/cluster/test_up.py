"""``pdspec up`` and ``pdspec down`` as a user runs them: processes of their own, an embedded Ray, the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.cluster
TINY = ("--model", "tiny", "--drafter", "ngram", "--head", "eagle3=random:1", "--threads", "1", "--port", "0")
START_S = 120


@pytest.fixture
def home(tmp_path):
    """A home of its own, with a Ray token of some other cluster in it. The cache stays out of the user's."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("stale")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "HOME": str(tmp_path), "PDSPEC_CACHE": str(tmp_path / "cache")}


def pdspec(home: dict[str, str], *argv: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdspec", *argv]
    return subprocess.run(command, env=home, capture_output=True, text=True, timeout=START_S, **options)


def test_detached_deployment_answers_and_ends(home):
    up = pdspec(home, "up", "--prefill", "0", "--decode", "1", "--detach", *TINY)
    assert up.returncode == 0, up.stderr
    (line,) = up.stdout.splitlines()
    word, endpoint = line.split()
    assert word == "ready"
    (record,) = (Path(home["PDSPEC_CACHE"]) / "run").glob("*.json")
    session = json.loads(record.read_text())["pid"]
    try:
        asked = pdspec(home, "generate", "hello", "--endpoint", endpoint, "--json", "--max-tokens", "8", "--ignore-eos")
        assert asked.returncode == 0, asked.stderr
        answer = json.loads(asked.stdout)
        assert len(answer["token_ids"]) == 8 and answer["decode_worker"] == "decode-0" and answer["kv_bytes"] == 0
        local = pdspec(
            home, "generate", "hello", "--local", "--model", "tiny", "--drafter", "none", "--json", "--max-tokens", "8",
            "--ignore-eos",
        )  # fmt: skip
        assert json.loads(local.stdout)["token_ids"] == answer["token_ids"]
        started = descendants(session)
        assert len(started) > 3
    finally:
        down = pdspec(home, "down")
    assert down.returncode == 0 and f"stopped {endpoint}" in down.stderr
    assert not record.exists()
    wait_gone({session, *started})


def test_interrupt_in_the_foreground_ends_everything(home, tmp_path):
    port = "50975"
    errors = (tmp_path / "errors").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "pdspec", "up", *TINY, "--port", port],
        env=home, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready 127.0.0.1:{port}\n", (tmp_path / "errors").read_text()
        taken = pdspec(home, "up", *TINY, "--port", port)
        assert taken.returncode == 2 and "error: port: cannot listen" in taken.stderr
        started = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    wait_gone(started)


def descendants(root: int) -> set[int]:
    """Processes below ``root``, however they are grouped."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def wait_gone(processes: set[int]) -> None:
    """Fail unless all ``processes`` end within some seconds."""
    deadline = time.monotonic() + 15
    while left := [process for process in processes if alive(process)]:
        assert time.monotonic() < deadline, [Path(f"/proc/{p}/cmdline").read_bytes() for p in left]
        time.sleep(0.1)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_box_script_serves_its_metrics(home, tmp_path):
    """deploy/one-box.sh: each port of deploy/prometheus.yaml answers with metrics of its own process."""
    deploy = Path(__file__).parents[2] / "deploy"
    (job,) = yaml.safe_load((deploy / "prometheus.yaml").read_text())["scrape_configs"]
    command = tmp_path / "pdspec"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pdspec "$@"\n')
    command.chmod(0o755)
    free = [flag for flag in TINY if flag not in ("--port", "0")]
    script = [str(deploy / "one-box.sh"), *free, "--port", "0", "--http-port", "0"]
    up = subprocess.run(script, env={**home, "PDSPEC": str(command)}, capture_output=True, text=True, timeout=START_S)
    try:
        assert up.returncode == 0 and up.stdout.startswith("ready 127.0.0.1:"), up.stderr
        own = {"router": "workers", "relay": "relay_bytes", "http": "http_requests", "prefill": "prefix_cache_pages",
               "decode": "decode_steps"}  # fmt: skip
        for entry in job["static_configs"]:
            with urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=10) as answer:
                assert f"# TYPE pdspec_{own[entry['labels']['process']]}" in answer.read().decode(), entry
    finally:
        down = pdspec(home, "down")
    assert down.returncode == 0 and not list((Path(home["PDSPEC_CACHE"]) / "run").iterdir())
