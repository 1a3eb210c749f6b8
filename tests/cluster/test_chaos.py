"""The quick form of ``pdspec chaos``: real processes, killed and stopped; every answer is the fault-free one."""

from __future__ import annotations

import pytest

from pdspec.study import chaos, chaos_drain

pytestmark = pytest.mark.cluster
QUICK = chaos.Plan(
    requests=40, seed=3, tokens=160, prompts=40, clients=10, kills=25, stops=12, deadline_s=90.0,
    drafters=("none", "ngram", "eagle3"),
)  # fmt: skip


@pytest.mark.timeout(280)
def test_chaos_loses_no_answer_and_no_page() -> None:
    result = chaos.run(QUICK)
    assert result["ok"], result
    assert result["mismatched"] == result["leaked_pages"] == result["orphans"] == result["hung"] == 0


def test_too_few_faults_are_no_proof() -> None:
    calm = chaos.Plan(requests=1000)
    least = {kind: chaos._due(kind, calm) for kind in chaos.LEAST}
    assert least == {"kill": 20, "other": 10, "moved": 100}
    assert calm.kills >= least["kill"] and calm.stops >= least["other"] and calm.cancels / 4 >= least["other"]


def test_a_rolling_restart_and_a_switch_of_roles_lose_no_request() -> None:
    plan = chaos_drain.Plan(clients=4, prompts=12, tokens=200, drain_s=0.2)
    worker = chaos.worker_config(chaos.Plan(tokens=plan.tokens, drafters=("none", "eagle3", "ngram")))
    result = chaos_drain.run(worker, plan, progress=lambda text: None)
    assert result["ok"], result
    assert [row["what"] for row in result["steps"]] == ["restart"] * 6 + ["switch to decode", "switch to prefill"]
