"""Conversations as cells of a study on real processes: later turns find the earlier ones in the prefix caches, and the
workers' clocks say what a cell took."""

from __future__ import annotations

import json

import pytest

from pdspec.study.cells.grid import StudyConfig, cells
from pdspec.study.cells.report import report
from pdspec.study.cells.run import run
from pdspec.study.cells.store import Store
from pdspec.study.cells.tables import read

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")


def test_two_cells_of_conversations_and_what_they_took(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    texts = ("Name a river in Africa.", "How many legs has a spider?")
    prompts.write_text("".join(json.dumps({"turns": [text, "And then?"]}) + "\n" for text in texts))
    study = StudyConfig.from_mapping({
        "name": "conversations", "models": ["tiny"], "drafters": ["none", "ngram"], "pd": ["1P1D"],
        "loads": ["closed 2"], "worker": {"threads": 1, "cache_tokens": 4096, "prefix_cache": "all"},
        "workload": {"prompts": str(prompts), "requests": 4, "turns": 2, "prompt_tokens": 160, "max_tokens": 24},
    })  # fmt: skip
    said: list[str] = []
    result = run(study, tmp_path / "out", progress=said.append)
    assert result["measured"] == 2 and not any("router does not tell" in line for line in said)
    rows = read(tmp_path / "out" / "requests.parquet")
    assert sorted((row["index"], row["turn"]) for row in rows) == [(n, n % 2 + 1) for n in range(4) for _ in range(2)]
    for row in rows:
        assert (row["prompt_tokens"] == 160) == (row["turn"] == 1) and row["output_tokens"] == 24
        assert (row["cached_tokens"] > 100) == (row["turn"] == 2), "no cell finds what another one asked"
        assert (row["prefill_cached_tokens"] > 100) == (row["turn"] == 2)
    for index in range(4):
        assert len({tuple(row["token_ids"]) for row in rows if row["index"] == index}) == 1, "whatever drafts"
    check_cells(tmp_path / "out")
    (tmp_path / "out" / "cells.parquet").unlink()
    assert run(study, tmp_path / "out", progress=said.append)["measured"] == 0
    check_cells(tmp_path / "out")  # a study that goes on has it all from the cells' files
    made = [one["name"] for one in report(tmp_path / "out")["figures"]]
    assert made[-2:] == ["split", "turns"]
    assert all("clocks" in Store(tmp_path / "out").spent(cell) for cell in cells(study))


def check_cells(out):
    plain, drafting = read(out / "cells.parquet")
    for row in (plain, drafting):
        assert row["draft_share"] + row["verify_share"] + row["other_share"] == pytest.approx(1.0)
        assert 0 < row["busy_share"] <= 1.0
        assert row["ttft_ms_turn_1_samples"] == row["ttft_ms_later_turns_samples"] == 2
        assert row["cached_share_later_turns"] > 0.5 > row["cached_share"] > 0
        assert (row["joules"] is None) == (row["energy_counters"] == "")
    assert plain["draft_share"] < drafting["draft_share"]
