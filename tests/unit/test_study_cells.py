"""A study's grid, its loads and its measures: values in, values out."""

from __future__ import annotations

import json

import pytest

from pdspec.errors import ConfigError
from pdspec.study.cells.grid import StudyConfig, cells
from pdspec.study.cells.loads import parse_load, starts
from pdspec.study.cells.measures import along, at, cost, measures, per_position, spread, verified
from pdspec.study.cells.store import Store
from pdspec.study.prompts import example_folder


def study(**values):
    return StudyConfig.from_mapping({"models": ["tiny"], "worker": {"threads": 1}, **values})


def test_a_grid_has_each_cell_once_and_an_id_that_hangs_on_its_values_alone():
    grid = cells(study(drafters=["none", "eagle3 chain(2)", "none"], handoffs=["direct", "relay"], loads=["closed 4"]))
    found = [(cell.pd, cell.drafter, cell.handoff) for cell in grid]
    assert found == [
        ("0P1D", "none", ""), ("0P1D", "eagle3", ""), ("1P1D", "none", "direct"), ("1P1D", "none", "relay"),
        ("1P1D", "eagle3", "direct"), ("1P1D", "eagle3", "relay"),
    ]  # fmt: skip
    assert len({cell.id for cell in grid}) == 6
    assert {cell.tree for cell in grid if cell.drafter == "eagle3"} == {"chain(2)"}
    judged = cells(study(drafters=["none"], loads=["closed 4"], slo={"ttft_ms": 1}, price_per_hour=3, name="other"))
    assert judged[0].id == grid[0].id
    other = cells(study(drafters=["none"], loads=["closed 4"], workload={"seed": 1}))
    assert other[0].id != grid[0].id


def test_cells_share_processes_unless_their_drafter_remembers_answers():
    grid = cells(study(drafters=["none", "ngram", "suffix"], pd=["1P1D"], loads=["closed 1", "closed 2"]))
    assert len(grid) == 6 and len({cell.stack for cell in grid}) == 3


def test_another_content_of_the_prompts_makes_other_cells(tmp_path):
    path = tmp_path / "own.jsonl"
    ids = []
    for text in ("one", "two"):
        path.write_text(json.dumps({"prompt": text}) + "\n")
        ids.append(cells(study(workload={"prompts": str(path)}))[0].id)
    assert ids[0] != ids[1]


def test_another_content_of_a_trace_makes_other_cells(tmp_path):
    path = tmp_path / "own.jsonl"
    ids = []
    for length in (5, 6):
        path.write_text(json.dumps({"timestamp": 0, "input_length": length, "output_length": 3}) + "\n")
        ids.append(cells(study(loads=[f"trace {path} 1"]))[0].id)
    assert ids[0] != ids[1]
    with pytest.raises(ConfigError, match="cannot read"):
        cells(study(loads=["trace nowhere.jsonl 1"]))


def test_a_study_that_moves_keeps_both_machines(tmp_path, monkeypatch):
    store, grid = Store(tmp_path), cells(study())
    assert [store.describe(study(), grid) for _ in range(2)] == [1, 1]
    monkeypatch.setattr("pdspec.study.cells.store.versions", lambda: {"torch": "0"})
    assert store.describe(study(), grid) == 2
    assert len(json.loads((tmp_path / "study.json").read_text())["runs"]) == 2


def test_the_shipped_study_is_the_grid_that_it_promises():
    grid = cells(StudyConfig.load(example_folder().parent / "long_cot.yaml"))
    assert len(grid) == 24 and len({cell.stack for cell in grid}) == 2
    assert {cell.drafter for cell in grid} == {"none", "ngram", "eagle3", "mtp"}
    assert all((cell.requests, cell.max_tokens, cell.temperature, cell.top_p) == (16, 512, 0.6, 0.95) for cell in grid)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pd": ["1:1"]}, "workers"), ({"pd": ["1P0D"]}, "workers"), ({"loads": ["closed"]}, "no load"),
        ({"loads": ["poisson 0"]}, "out of range"), ({"handoffs": ["pigeon"]}, "handoff"),
        ({"workload": {"prompts": "no such set"}}, "workload"), ({"drafter": "none"}, "drafters"),
        ({"drafters": []}, "no cell"),
    ],
)  # fmt: skip
def test_what_is_no_study_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        cells(study(**values))


def test_open_loads_come_at_moments_of_their_own():
    poisson = starts(parse_load("poisson 4"), 4000, 1)
    assert poisson[0] == 0 and poisson == sorted(poisson) == starts(parse_load("poisson 4"), 4000, 1)
    assert 3999 / poisson[-1] == pytest.approx(4, rel=0.1)
    bursty = starts(parse_load("bursty 4 8"), 4000, 1)
    assert len(set(bursty)) == 500 and bursty[:8] == [0.0] * 8
    assert 3992 / bursty[-1] == pytest.approx(4, rel=0.2)
    trace = f"trace {example_folder().parent}/traces/mooncake-sample.jsonl"
    assert starts(parse_load(f"{trace} 2"), 5, 0) == [when / 2 for when in starts(parse_load(trace), 5, 0)]
    with pytest.raises(ConfigError, match="requests"):
        starts(parse_load(trace), 1_000_000, 0)


def row(**changes):
    """Four messages of 1, 2, 3 and 1 tokens, the first after 100 ms, one each 20 ms."""
    known = {
        "error": "", "asked_s": 0.0, "ttft_ms": 100.0, "total_ms": 160.0, "piece_ms": [100.0, 120.0, 140.0, 160.0],
        "piece_tokens": [1, 2, 3, 1], "output_tokens": 7, "token_ids": list(range(7)), "verifications": 3,
        "drafted_tokens": 6, "accepted_tokens": 3, "accepted_per_position": [2, 1], "reached_per_position": [3, 2],
        "kv_bytes": 10, "draft_kv_bytes": 1, "transfer_exposed_ms": 2.0,
    }  # fmt: skip
    return {**known, **changes}


REFUSED = {
    "error": "Overloaded: no room", "asked_s": 0.5, "ttft_ms": None, "total_ms": None, "piece_ms": [],
    "piece_tokens": [], "output_tokens": 0, "token_ids": [], "verifications": 0,
}  # fmt: skip


def test_measures_are_those_of_the_rows():
    rows = [row(), row(asked_s=0.84, ttft_ms=150.0, piece_ms=[150.0, 155.0, 156.0, 160.0]), row(**REFUSED)]
    found = measures(rows, ttft_ms=120, tpot_ms=10.0, price_per_hour=3.6)
    assert (found["rows"], found["refused"], found["output_tokens"], found["span_s"]) == (3, 1, 14, 1.0)
    assert found["tokens_per_second"] == 14 and found["goodput_tokens_per_second"] == 7
    assert found["good_share"] == pytest.approx(1 / 3) and found["goodput_requests_per_second"] == 1
    assert found["ttft_ms_p50"] == 100 and found["ttft_ms_p90"] == 150 and found["ttft_ms_p99"] is None
    assert found["itl_ms_samples"] == 6 and found["itl_ms_p50"] == 5 and found["itl_ms_p90"] == 20
    assert found["tpot_ms_p90"] == 10 and found["tpot_ms_p50"] == pytest.approx(10 / 6)
    assert found["cost_per_million_tokens"] == pytest.approx(0.001 / 14 * 1e6)
    assert found["acceptance_length"] == 2.0 and found["accepted_share"] == 0.5
    assert found["acceptance_per_position"] == pytest.approx([2 / 3, 1 / 2])


def test_percentiles_need_samples():
    assert spread("x", range(1, 100))["x_p99"] is None
    assert spread("x", range(1, 101)) == {"x_p50": 50, "x_p90": 90, "x_p99": 99, "x_samples": 100}
    assert at([], 0.5) is None and cost(0.0, 5, 1.0) is None


def test_a_cell_where_all_was_refused_has_no_figures():
    found = measures([row(**REFUSED)], ttft_ms=1, tpot_ms=1, price_per_hour=1)
    assert found["refused"] == 1 and found["tokens_per_second"] == 0 and found["ttft_ms_p50"] is None
    assert found["acceptance_length"] is None and found["acceptance_along"] == [] == per_position([])


def test_acceptance_is_told_apart_along_the_answer_and_outside_repetition():
    gram = list(range(8))
    looped = row(token_ids=[*gram, *gram], piece_tokens=[1, 1, 6, 4, 4], output_tokens=16, verifications=4)
    assert verified(looped) == [(1, 1, False), (2, 6, False), (8, 4, True), (12, 4, True)]
    found = measures([looped], ttft_ms=1e3, tpot_ms=1e3, price_per_hour=0)
    assert found["acceptance_length"] == 15 / 4 and found["acceptance_length_not_repeated"] == 7 / 2
    assert found["repeated_8gram_share"] == 0.5 and found["verifications_not_repeated"] == 2
    assert along([(1, 2, False), (63, 4, False), (130, 1, False)]) == [3.0, None, 1.0]


def test_a_cell_is_kept_whole_or_not_at_all(tmp_path):
    cell, store = cells(study())[0], Store(tmp_path)
    with store.held():
        with pytest.raises(KeyboardInterrupt), store.writing(cell) as write:
            write({"index": 0})
            raise KeyboardInterrupt
        assert not store.has(cell)
        with store.writing(cell) as write:
            write({"index": 1})
            write({"index": 0})
        assert [one["index"] for one in store.rows(cell)] == [0, 1] and store.rows(cell)[0]["cell"] == cell.id
        assert [path.name for path in (tmp_path / "cells").iterdir()] == [f"{cell.id}.jsonl"]
        with pytest.raises(ConfigError, match="another study"), Store(tmp_path).held():
            pass
