"""The closed form and the roofline: textbook figures, sizes that model cards state, and how advice moves with load."""

from __future__ import annotations

import json
import sys

import pytest

from pdspec.cli import app
from pdspec.errors import ConfigError, InvalidRequest
from pdspec.study.plan import advice, report
from pdspec.study.plan.advice import Load
from pdspec.study.plan.closed import best_drafts, expected_of, expected_tokens, speculation
from pdspec.study.plan.drafts import draft_cost
from pdspec.study.plan.hardware import hardware
from pdspec.study.plan.report import Question, answer
from pdspec.study.plan.roofline import Roofline
from pdspec.study.plan.shapes import Shape, model_shape


def roofline(model: str = "llama-3.1-8b", device: str = "a100-80gb", devices: int = 1) -> Roofline:
    return Roofline(hardware=hardware(device), shape=Shape(config=model_shape(model)), devices=devices)


def test_expected_tokens_is_the_sum_of_survivals():
    for alpha in (0.0, 0.3, 0.8, 1.0):
        for drafts in range(6):
            assert expected_tokens(alpha, drafts) == pytest.approx(sum(alpha**d for d in range(drafts + 1)))
            assert expected_tokens(alpha, drafts) == pytest.approx(expected_of([alpha] * drafts))
    with pytest.raises(InvalidRequest, match="alpha"):
        expected_tokens(1.2, 3)


def test_best_drafts_are_better_than_their_neighbours_and_none_where_drafts_are_dear():
    best = best_drafts(0.8, 1.0, 10.0)
    for other in (best.drafts - 1, best.drafts + 1):
        assert speculation(0.8, other, 1.0, 10.0).token_s >= best.token_s
    assert best_drafts(0.3, 5.0, 10.0).drafts == 0


def test_the_textbook_case(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pdspec", "plan", "--case", "a100-llama2-13b", "--json"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["expected_tokens"] == pytest.approx(3.3616)
    assert 6.7 <= found["ms_per_token"] <= 7.0
    assert found["baseline_ms_per_token"] == pytest.approx(20.0, rel=0.01)
    assert 2.85 <= found["speedup"] <= 3.0
    assert 0 < found["memory"]["draft_share"] < 0.01
    assert found["hardware"] and found["versions"]


@pytest.mark.parametrize(
    ("model", "billions", "active", "kv_bytes"),
    [
        ("llama-2-13b", 13.0, 12.9, 819_200),  # 2 · 40 heads · 128 · 40 layers · 2 bytes
        ("llama-3.1-8b", 8.03, 7.5, 131_072),  # GQA: 8 KV heads
        ("llama-3.1-70b", 70.6, 69.5, 327_680),
        ("mixtral-8x7b", 46.7, 12.7, 131_072),
        ("qwen3-30b-a3b", 30.5, 3.04, 98_304),
        ("deepseek-v3", 671.0, 36.6, 70_272),  # MLA: (512 + 64) · 61 · 2
    ],
)
def test_sizes_are_those_of_the_model_cards(model, billions, active, kv_bytes):
    shape = roofline(model).shape
    assert shape.weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active_weights / 1e9 == pytest.approx(active, rel=0.02)
    assert shape.kv_bytes == kv_bytes


def test_more_rows_read_more_experts_but_never_more_than_all():
    shape = roofline("mixtral-8x7b").shape
    one, few, many = (shape.read_bytes(rows) for rows in (1, 4, 64))
    assert one < few < many <= shape.weight_bytes
    dense = roofline("llama-3.1-8b").shape
    assert dense.read_bytes(1) == dense.read_bytes(64)


def test_batch_takes_speculation_away_and_long_contexts_give_it_back():
    target = roofline()
    cost = draft_cost("eagle3", target)
    rows = advice.batches(target, cost, 0.8, Load(), sizes=(1, 64, 512))
    assert rows[0]["speedup"] > rows[1]["speedup"] > rows[2]["speedup"] == 1.0
    assert rows[2]["tree"] == "" and not advice.best_chain(target, cost, 0.8, Load(batch=512)).nodes
    found = answer(Question(drafter="eagle3"))["contexts"]
    assert found[0]["baseline_ms_per_token"] < found[-1]["baseline_ms_per_token"]


def test_a_tree_of_the_best_nodes_beats_the_chain_where_rows_are_free():
    target = roofline()
    cost = draft_cost("eagle3", target)
    tree, chain = advice.best_tree(target, cost, 0.7, Load()), advice.best_chain(target, cost, 0.7, Load())
    assert tree.token_s < chain.token_s < advice.plain(target, Load()).token_s
    survival = advice.rank_survival(0.7, 3)
    assert (survival[:-1] >= survival[1:]).all()
    assert survival[0] == pytest.approx(0.7) and 0.7**3 in [pytest.approx(float(one)) for one in survival]


def test_speculation_asks_for_more_prefill_workers_and_longer_answers_for_fewer():
    target = roofline()
    cost = draft_cost("eagle3", target)
    load = Load(batch=32, prompt=4096, output=256)
    with_drafts = advice.ratio(target, advice.best_chain(target, cost, 0.8, load), load)["prefill_per_decode"]
    without = advice.ratio(target, advice.plain(target, load), load)["prefill_per_decode"]
    longer = Load(batch=32, prompt=4096, output=2048)
    assert with_drafts > without > advice.ratio(target, advice.plain(target, longer), longer)["prefill_per_decode"]


def test_a_handoff_says_what_moves_and_who_prefills_the_drafter():
    target = roofline()
    moved = advice.transfer(target, draft_cost("eagle3", target), 1000)
    assert moved["kv_bytes"] == 1000 * 131_072
    assert moved["draft_kv_bytes"] < moved["hidden_bytes_instead"] and moved["draft_prefill"] == "prefill"
    assert 0 < moved["exposed_seconds"] < moved["seconds"]


def test_colocated_prefills_slow_tokens_down():
    target = roofline()
    found = advice.colocated(target, advice.plain(target, Load(batch=8)), Load(batch=8))
    assert found["slowdown"] > 1 and found["worst_gap_ratio"] > 2


def test_what_does_not_exist_is_refused_by_name():
    with pytest.raises(ConfigError, match="a100-80gb"):
        answer(Question(hardware="a100-80g"))
    with pytest.raises(ConfigError, match="vocabulary"):
        answer(Question(model="llama-3.1-8b", drafter="llama-68m"))
    with pytest.raises(ConfigError, match="case"):
        report.case("a100")
    with pytest.raises(ConfigError, match="which model"):
        answer(Question(drafter="draft_model"))
