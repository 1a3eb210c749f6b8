"""``pdspec doctor`` and ``pdspec top``: what they make of a router's answers, and that remedies are named."""

from __future__ import annotations

import json
import time

import pytest
from rich.console import Console

from pdspec.cli import top
from pdspec.cli.app import build_app
from pdspec.errors import PeerLost
from pdspec.study import doctor


def worker(name: str, **changes) -> dict:
    plain = {
        "worker_id": name, "role": "decode", "address": f"{name}:1", "state": "ready", "reason": "", "running": 1,
        "queued": 0, "pending": 0, "steps": 5, "total_pages": 100, "free_pages": 75, "fingerprint": "a" * 32,
        "metrics": {"clock": time.time(), "generation_tokens": 100.0, "verifications": 50.0},
    }  # fmt: skip
    return {**plain, **changes}


class FakeClient:
    def __init__(self, *looks: list[dict]) -> None:
        self._looks = list(looks)

    def __call__(self, endpoint, access=None):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *rest) -> None: ...

    def workers(self):
        if not self._looks:
            raise PeerLost("no router answers at x:1", remedy="start one")
        return self._looks.pop(0)

    def requests(self):
        return [{"request_id": "r-1", "drafter": "ngram", "prompt_tokens": 5, "output_tokens": 7, "max_tokens": 9,
                 "age_s": 1.5}]  # fmt: skip


def by_name(report: dict) -> dict[str, dict]:
    return {found["name"]: found for found in report["findings"]}


def test_this_machine_is_looked_at(monkeypatch, tmp_path):
    monkeypatch.setenv("PDSPEC_CACHE", str(tmp_path))
    found = by_name(doctor.run())
    assert {"python", "torch", "ray", "grpcio", "compiler", "memory", "cache", "ray token"} <= found.keys()
    assert found["python"]["state"] == found["compiler"]["state"] == "ok"
    monkeypatch.setenv("CC", "/no/such/compiler")
    broken = doctor.run()
    assert not broken["ok"] and "gcc" in by_name(broken)["compiler"]["remedy"]


def test_a_deployment_is_looked_at(monkeypatch):
    late = {"clock": time.time() - 60}
    fleet = [
        worker("d0"), worker("d1", fingerprint="b" * 32, state="refused", reason="fingerprint differs", metrics=late),
        worker("p0", role="prefill", state="lost", reason="does not answer"),
    ]  # fmt: skip
    monkeypatch.setattr(doctor, "RouterClient", FakeClient(fleet))
    report = doctor.run(endpoint="x:1")
    found = by_name(report)
    assert not report["ok"] and found["d0"]["state"] == "ok"
    assert (found["d1"]["state"], found["p0"]["state"], found["fingerprints"]["state"]) == ("fail",) * 3
    assert "same model" in found["fingerprints"]["remedy"] and found["p0"]["remedy"]
    assert found["clocks"]["state"] == "warn" and "d1 is off by -60" in found["clocks"]["found"]
    monkeypatch.setattr(doctor, "RouterClient", FakeClient())
    assert by_name(doctor.run(endpoint="x:1"))["router"]["remedy"] == "start one"


def test_top_shows_rates_between_two_looks(monkeypatch, capsys):
    later = {"clock": 0.0, "generation_tokens": 160.0, "verifications": 70.0}
    client = FakeClient([worker("d0")], [worker("d0", metrics=later), worker("p0", role="prefill", metrics={})])
    monkeypatch.setattr(top, "RouterClient", client)
    build_app()(["top", "--once", "--json", "--interval", "0.1"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    row = report["workers"][0]
    assert row["acceptance_length"] == 3.0 and 0 < row["tokens_per_s"] <= 600 and row["kv_cache_usage"] == 0.25
    assert report["workers"][1]["tokens_per_s"] == 0 and report["requests"][0]["request_id"] == "r-1"
    console = Console(width=120, record=True)
    console.print(top.table("x:1", report["workers"], report["requests"]))
    text = console.export_text()
    assert "d0" in text and "r-1" in text and "25%" in text


def test_a_lossy_setting_is_shown_by_both(monkeypatch):
    lossy = {"clock": time.time(), "wire_kv_lossy": 1.0}
    monkeypatch.setattr(doctor, "RouterClient", FakeClient([worker("d0", metrics=lossy), worker("d1")]))
    found = by_name(doctor.run(endpoint="x:1"))["wire_kv"]
    assert found["state"] == "warn" and found["found"].startswith("LOSSY: d0 round") and "whole" in found["remedy"]
    monkeypatch.setattr(doctor, "RouterClient", FakeClient([worker("d0"), worker("d1")]))
    assert "wire_kv" not in by_name(doctor.run(endpoint="x:1"))
    console = Console(width=160, record=True)
    console.print(top.table("x:1", top.Looks(FakeClient([worker("d0", metrics=lossy)])).look()[0], []))
    assert "LOSSY wire KV" in console.export_text()


def test_a_live_table_is_no_object():
    with pytest.raises(Exception, match="--once"):
        build_app()(["top", "--json"], standalone_mode=False)
