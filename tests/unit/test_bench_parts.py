"""The parts of the benchmarks that can be wrong without anyone noticing."""

from __future__ import annotations

import numpy as np
import pytest

from pdspec.engine.speculation import observing
from pdspec.engine.steptimes import DraftTimes, VerifyTimes
from pdspec.errors import ConfigError, InvalidRequest
from pdspec.repetition import repeated_share
from pdspec.spec.registry import NAMES
from pdspec.spec.tree import parse_tree
from pdspec.study.bench_budget import Step, Table, run
from pdspec.study.bench_decode import Setting, _summary, _tried, settings_of


def test_repeated_share_counts_tokens_inside_ngrams_seen_before_in_the_same_answer():
    once = list(range(20))
    assert repeated_share([once]) == 0.0
    assert repeated_share([once + once]) == 0.5
    assert repeated_share([once, once]) == 0.0  # other answers do not count
    assert repeated_share([[7] * 16]) == 15 / 16  # the second of the overlapping 8-grams already repeats the first
    assert repeated_share([]) == 0.0


def test_every_setting_that_is_tried_stays_within_the_node_budget():
    for name in NAMES:
        for budget in (2, 5, 8):
            settings = settings_of(name, budget)
            assert settings and len(set(settings)) == len(settings)
            assert all(parse_tree(s.tree).max_nodes <= budget for s in settings if s.tree)


def test_suffix_also_reports_its_first_try_since_it_remembers_the_answers():
    def outcome(rate, length):
        return {"tokens_per_second": rate, "acceptance_length": length, "ms_per_verification": 1.0, "answers": [(1, 2)]}

    plain, cold, warm = Setting("none"), Setting("suffix", "dynamic(8,4,8)"), Setting("suffix", "chain(8)")
    tried = {plain: outcome(10.0, 1.0), cold: outcome(15.0, 1.5), warm: outcome(70.0, 8.0)}
    measured = {plain: [tried[plain]], warm: [outcome(80.0, 8.5)]}
    table = _summary(tried, {"none": plain, "suffix": warm}, measured, 8)["drafters"]
    assert "first_time" not in table["none"] and table["suffix"]["speedup_over_none"] == 8.0
    assert table["suffix"]["first_time"] == {
        "tree": "dynamic(8,4,8)", "tokens_per_second": 15.0, "acceptance_length": 1.5,
    }  # fmt: skip


def test_the_budget_s_figures_depend_on_the_table_alone():
    staircase = VerifyTimes(rows=np.array([1, 8, 16]), seconds=np.array([1.0, 1.2, 3.0]))
    draft = DraftTimes.none().corrected(1, 1, 0.05).corrected(3, 2, 0.1)
    drafts = {"chain(4)": {"draft_model": draft, observing("draft_model"): DraftTimes.none()}}
    table = Table(verify=staircase, drafts=drafts).to_json()

    def figures() -> dict:
        return run(
            worker={"model": "tiny", "cache_tokens": 2048, "threads": 1, "heads": {"draft_model": "tiny"}},
            drafter="draft_model", trees=["chain(4)"], cap="chain(4)", concurrency=[2], temperature=0.0, prompts=None,
            num_prompts=2, max_tokens=24, table=table, wall_pairs=0, progress=lambda text: None,
        )["concurrency"]["2"]  # fmt: skip

    first = figures()
    assert first == figures() and first["same_tokens"]
    assert first["fixed"]["none"]["tokens_per_second"] == pytest.approx(2 / 1.2, rel=1e-6)
    assert first["goodput"]["rows_per_step"] > 2 and first["ratio_to_none"] > 1


def test_a_step_costs_its_forward_its_drafts_and_what_caught_up():
    times = DraftTimes.none()
    drafts = {"ngram": times.corrected(0, 0, 0.5), observing("ngram"): times.corrected(0, 0, 0.25)}
    table = Table(verify=VerifyTimes(rows=np.array([1, 4]), seconds=np.array([1.0, 2.0])), drafts={"chain(2)": drafts})
    plain = Step(rows=1, kv_tokens=9, drafted={}, behind={})
    both = Step(rows=3, kv_tokens=9, drafted={"ngram": (2, 1)}, behind={"ngram": 1})
    assert table.seconds(plain, "") == 1.0
    assert table.seconds(both, "chain(2)") == pytest.approx(2.0 + 0.5 + 0.25 + 0.25, abs=0.01)


class Modules:
    """A bench of a family that drafts ``depth`` tokens ahead."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def run(self, setting: Setting) -> dict[str, str]:
        if setting.tree and parse_tree(setting.tree).depth > self.depth:
            raise InvalidRequest(f"{setting.tree} is too deep", field="tree", remedy="")
        return {"ran": str(setting)}


def test_settings_that_a_head_cannot_draft_are_left_out_and_named():
    tried, refused = _tried(Modules(2), ("none", "mtp"), 5)
    assert [str(setting) for setting in tried] == ["none", "mtp chain(2)", "mtp dynamic(2,3,5)"]
    assert set(refused) == {"mtp chain(3)", "mtp chain(5)", "mtp dynamic(3,4,5)", "mtp dynamic(4,4,5)"}
    with pytest.raises(ConfigError, match="mtp drafts no tree of 5 nodes"):
        _tried(Modules(1), ("none", "mtp"), 5)
