"""Metrics: what is counted, where it is served, and that docs/metrics.md lists all of it and nothing else."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path

import pytest

from pdspec.errors import ConfigError, Overloaded
from pdspec.metrics import DecodeMetrics, HttpMetrics, PrefillMetrics, RelayMetrics, RouterMetrics, exposed
from pdspec.types import GenerationStats

DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
READS = {"running": lambda: 2, "waiting": lambda: 3, "pool": lambda: (5, 20)}


def decode() -> DecodeMetrics:
    return DecodeMetrics(engine=lambda: (7, {"draft": 0.5, "forward": 1.5}), **READS)


def sets() -> dict[str, object]:
    router = RouterMetrics(running=lambda: 1, workers=lambda: {("decode", "ready"): 2})
    return {
        "router": router,
        "prefill": PrefillMetrics(**READS),
        "decode": decode(),
        "relay": RelayMetrics(running=int),
        "http": HttpMetrics(),
    }


def names(metrics) -> set[str]:
    kinds = {"counter": "_total", "histogram": "", "gauge": ""}
    return {f"{family.name}{kinds[family.type]}" for family in metrics.registry.collect()}


def test_the_page_lists_every_metric_of_every_role():
    text, process = DOCS.read_text(), {n for n in names(RelayMetrics(running=int)) if n.startswith("pdspec_process_")}
    sections = dict(re.findall(r"^## (\w[\w ]*)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    listed = {title: set(re.findall(r"^\| `(pdspec_\w+)`", body, flags=re.M)) for title, body in sections.items()}
    for role, metrics in sets().items():
        assert listed[role.capitalize()] == names(metrics) - process, role
    assert listed["Every process"] == process


def test_what_an_answer_leaves():
    metrics = decode()
    stats = GenerationStats(
        prompt_tokens=10, output_tokens=9, verifications=4, drafted_tokens=12, accepted_tokens=4, drafter="eagle3",
        first_draft_accepted=2, accepted_per_position=(3, 1), reached_per_position=(4, 3),
    )  # fmt: skip
    metrics.answer(stats)
    metrics.answer(GenerationStats(prompt_tokens=1, output_tokens=1))  # a single token: nothing was verified
    metrics.transfer(kv=100, draft=30, hidden=0)
    read = metrics.registry.get_sample_value
    eagle = {"drafter": "eagle3"}
    assert read("pdspec_generation_tokens_total") == 10 and read("pdspec_prompt_tokens_total") == 11
    assert read("pdspec_spec_decode_num_accepted_tokens_per_pos_total", {**eagle, "position": "1"}) == 1
    assert read("pdspec_spec_decode_num_reached_per_pos_total", {**eagle, "position": "0"}) == 4
    assert read("pdspec_spec_decode_acceptance_length_sum", eagle) == 2.0
    assert read("pdspec_spec_decode_first_accepted_tokens_sum", eagle) == 2
    assert read("pdspec_spec_decode_goodput_per_verified_row") == 8 / 16
    assert read("pdspec_transfer_bytes_total", {"kind": "draft_kv"}) == 30
    assert read("pdspec_kv_cache_usage_perc") == 0.25 and read("pdspec_num_requests_waiting") == 3
    assert read("pdspec_decode_steps_total") == 7
    assert read("pdspec_decode_phase_seconds_total", {"phase": "forward"}) == 1.5
    assert metrics.totals() == (10, 4)


def test_what_the_router_sees():
    metrics = sets()["router"]
    watch = metrics.watch(100.0)
    watch.chunk(1, 100.5)
    watch.chunk(0, 100.6)
    watch.chunk(4, 100.9)
    watch.done("length", GenerationStats(prompt_tokens=3, moves=1, queue_ms=20.0), 100.9)
    metrics.watch(0.0).failed(Overloaded("full"))
    metrics.watch(0.0).failed(GeneratorExit())
    read = metrics.registry.get_sample_value
    assert read("pdspec_time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert read("pdspec_inter_token_latency_seconds_sum") == pytest.approx(0.1)
    assert read("pdspec_e2e_request_latency_seconds_sum") == pytest.approx(0.9)
    assert read("pdspec_request_queue_time_seconds_sum") == pytest.approx(0.02)
    assert read("pdspec_generation_tokens_total") == 5 and read("pdspec_request_replays_total") == 1
    assert read("pdspec_request_success_total", {"finish_reason": "length"}) == 1
    assert read("pdspec_request_failure_total", {"code": "RESOURCE_EXHAUSTED"}) == 1
    assert read("pdspec_request_failure_total", {"code": "CANCELLED"}) == 1
    assert read("pdspec_workers", {"role": "decode", "state": "ready"}) == 2


def test_served_over_http_or_not_at_all():
    metrics = decode()
    with exposed(metrics, host="127.0.0.1", port=-1) as port:
        assert port == -1
    with exposed(metrics, host="127.0.0.1", port=0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            assert b"pdspec_kv_cache_usage_perc 0.25" in answer.read()
        with pytest.raises(ConfigError) as caught, exposed(metrics, host="127.0.0.1", port=port):
            pass
        assert caught.value.field == "metrics_port"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
