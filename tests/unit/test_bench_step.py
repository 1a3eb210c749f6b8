"""The shares of a step, on a model that costs nothing."""

from __future__ import annotations

import pytest

from pdspec.study.bench_mixed import make_plan
from pdspec.study.bench_step import run
from pdspec.study.heads import worker_config
from pdspec.study.settings import Setting


def test_parts_of_a_step_add_up():
    found = run(
        worker={"model": "tiny", "cache_tokens": 2048, "threads": 1},
        settings=[Setting("none"), Setting("ngram", "chain(2)")],
        batch=2, temperature=0.6, top_p=0.95, prompts=None, num_prompts=2, max_tokens=12, runs=1,
        progress=lambda text: None,
    )  # fmt: skip
    assert set(found["settings"]) == {
        "none greedy", "none sampled", "ngram chain(2) greedy", "ngram chain(2) sampled",
    }  # fmt: skip
    for row in found["settings"].values():
        assert row["step"] == pytest.approx(row["draft"] + row["forward"] + row["python"])
        assert 0 < row["sampling"] < row["step"] and 0 < row["python_share"] < 1
    assert found["settings"]["none greedy"]["acceptance_length"] == 1.0
    assert {floor["name"] for floor in found["floors"]} == {
        "python_share", "sampling_share", "rows_8", "rows_16", "draft_row",
    }  # fmt: skip
    assert found["rows"]["1"]["ratio"] == 1.0 and found["draft_row"]["ms"] > 0
    assert found["rows"]["24"]["floor_ms"] >= found["rows"]["1"]["floor_ms"] > 0


def test_arrivals_are_the_same_every_time_and_answers_outlast_them():
    config = worker_config({"model": "tiny", "drafter": "none"}, ("none",))
    plan, again = (make_plan(config, 2, 40, 4.0, 3, 5.0) for _ in range(2))
    assert plan == again and len(plan.prompts) == 3 and list(plan.arrivals) == sorted(plan.arrivals)
    assert all(len(prompt.prompt_ids) == 40 for prompt in plan.prompts)
    assert all(5e-3 * one.sampling.max_tokens > plan.arrivals[-1] for one in plan.answers)
