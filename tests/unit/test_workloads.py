"""Prompt sets by name, and what sampled decoding is compared with."""

from __future__ import annotations

import pytest

from pdspec.errors import ConfigError
from pdspec.prompts import load_prompts
from pdspec.study.bench_sampled import against_greedy, twins
from pdspec.study.settings import Setting, settings_of
from pdspec.study.workloads import REPETITIVE, names, workload


def test_own_sets_are_there_and_other_names_refused():
    prompts = load_prompts(workload(REPETITIVE))
    assert {prompt.category for prompt in prompts} >= {"fill_json", "edit_code", "edit_table"}
    assert all(len(prompt.text) > 200 for prompt in prompts)
    assert load_prompts(workload("math")) == load_prompts(workload("word_problems"))
    assert {"code", "mtbench", "humaneval"} <= set(names())
    with pytest.raises(ConfigError, match="workload"):
        workload("repetitve")


def test_prompts_are_named_once():
    from pdspec.cli.runs import Shared

    both = Shared(worker={}, prompts="file", workload="code", num_prompts=1, max_tokens=1, json=False)
    with pytest.raises(ConfigError, match="named twice"):
        both.asked()
    alone = Shared(worker={}, prompts=None, workload="code", num_prompts=1, max_tokens=1, json=False)
    assert alone.asked()["prompts"] == workload("code")


def test_sampling_is_judged_by_the_time_of_a_verification():
    best = {"none": Setting("none"), "ngram": Setting("ngram", "chain(2)")}
    sampled = twins(best, 0.6, 0.95)
    assert not twins(best, 0.0, 0.95) and str(sampled["ngram"]) == "ngram chain(2) T=0.6 top_p=0.95"

    def row(ms: float, length: float, token: int) -> dict:
        rate = 1e3 * length / ms
        known = {"tokens_per_second": rate, "acceptance_length": length, "ms_per_verification": ms}
        return {**known, "answers": [(token,)]}

    measured = {
        best["none"]: [row(10.0, 1.0, 1)], best["ngram"]: [row(11.0, 1.5, 1)],
        sampled["none"]: [row(10.5, 1.0, 2)], sampled["ngram"]: [row(12.0, 1.1, 2)],
    }  # fmt: skip
    found = against_greedy(measured, best, sampled)
    assert found["same_tokens"] and found["drafters"]["ngram"]["ratio_at_equal_acceptance"] == pytest.approx(11 / 12)
    measured[sampled["ngram"]][0]["answers"] = [(3,)]
    assert not against_greedy(measured, best, sampled)["same_tokens"]


def test_long_chains_are_tried_where_nodes_allow():
    assert [one.tree for one in settings_of("ngram", 16)] == [f"chain({k})" for k in (2, 3, 5, 8, 12, 16)]
