"""One answer through three roles, and what it leaves in metrics, spans, logs and the router's list."""

from __future__ import annotations

import json
import logging

import pytest

from pdspec.client import RouterClient
from pdspec.config import RouterConfig
from pdspec.telemetry import setup_logging
from pdspec.types import SamplingParams, UserRequest
from router.service import launch
from tests.contract import span_collector
from tests.parity.roles import running, wait_until

TRACES = "tests.contract.span_collector:Collector"
ASK = UserRequest(
    prompt_ids=tuple(range(60)), request_id="asked-1", sampling=SamplingParams(max_tokens=30, ignore_eos=True)
)


@pytest.fixture
def served():
    span_collector.FOUND.clear()
    with running(traces=TRACES, metrics_port=0) as roles:
        config = RouterConfig(
            model="tiny", port=0, prefill=(roles.prefill.address,), decode=(roles.decode.address,), traces=TRACES,
            heartbeat_s=0.1, metrics_port=0,
        )  # fmt: skip
        router = launch(config)
        try:
            with RouterClient(router.address) as client:
                client.wait_ready(workers=2)
                yield roles, router, client
        finally:
            router.stop()


def test_an_answer_is_counted_and_traced_in_every_role(served, caplog):
    roles, router, client = served
    caplog.set_level(logging.INFO)
    answer = client.generate(ASK)
    stats = answer.stats
    metrics = {"router": router.service.metrics, "decode": roles.decode.metrics, "prefill": roles.prefill.metrics}
    read = {role: found.registry.get_sample_value for role, found in metrics.items()}
    assert wait_until(lambda: read["decode"]("pdspec_generation_tokens_total") == 30)
    assert read["router"]("pdspec_generation_tokens_total") == 30
    assert read["router"]("pdspec_inter_token_latency_seconds_count") == stats.verifications
    assert read["router"]("pdspec_workers", {"role": "decode", "state": "ready"}) == 1
    assert wait_until(lambda: read["prefill"]("pdspec_prompt_tokens_total") == 60)
    for role in ("decode", "prefill"):
        assert read[role]("pdspec_transfer_bytes_total", {"kind": "target_kv"}) == stats.kv_bytes
        assert read[role]("pdspec_transfer_bytes_total", {"kind": "draft_kv"}) == stats.draft_kv_bytes
    assert read["decode"]("pdspec_spec_decode_num_drafts_total", {"drafter": "eagle3"}) == stats.verifications
    assert read["decode"]("pdspec_transfer_exposed_seconds_count") == 1
    (worker,) = [entry for entry in client.workers() if entry["role"] == "decode"]
    assert wait_until(lambda: client.workers()[1]["metrics"]["generation_tokens"] == 30), worker["metrics"]
    for tracer in (roles.decode.tracer, roles.prefill.tracer, router.service.tracer):
        tracer.flush()
    spans = {span.name: span for span in span_collector.FOUND}
    names = {"request", "queue", "prefill", "prefill queue", "prefill compute", "first token", "transfer", "decode"}
    assert set(spans) == names and len({span.context.trace_id for span in spans.values()}) == 1
    root = spans["request"]
    assert all(span.parent.span_id == root.context.span_id for name, span in spans.items() if name != "request")
    assert root.start_time <= spans["queue"].start_time <= spans["prefill"].start_time <= spans["decode"].start_time
    assert spans["decode"].attributes["tokens"] == 30 and root.attributes["request_id"] == "asked-1"


def test_requests_under_way_are_listed_and_forgotten(served):
    _, router, client = served
    pieces = client.stream(ASK)
    next(pieces)
    (entry,) = client.requests()
    assert entry["request_id"] == "asked-1" and entry["max_tokens"] == 30 and entry["prompt_tokens"] == 60
    pieces.close()
    assert wait_until(lambda: not client.requests())
    failed = router.service.metrics.registry.get_sample_value
    assert wait_until(lambda: failed("pdspec_request_failure_total", {"code": "CANCELLED"}) == 1)


def test_json_logs_carry_the_request(capsys):
    before = logging.getLogger().handlers[:]
    try:
        setup_logging("info", name="decode-0", log_format="json")
        logging.getLogger("x").warning("prefill on %s failed", "a:1", extra={"request_id": "r-7"})
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("x").exception("it")
    finally:
        logging.basicConfig(handlers=before, force=True)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["request_id"] == "r-7" and first["worker"] == "decode-0" and first["level"] == "warning"
    assert first["message"] == "prefill on a:1 failed" and first["time"].endswith("Z")
    assert "ValueError: broken" in second["error"] and "request_id" not in second
