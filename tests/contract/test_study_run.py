"""A study on real processes: killed between two cells and inside one, it goes on; no cell is lost or measured twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pdspec.study.cells.grid import StudyConfig, cells
from pdspec.study.cells.run import run
from pdspec.study.cells.store import Store

pytest.importorskip("pyarrow")
STUDY = {
    "name": "tiny", "models": ["tiny"], "drafters": ["none", "ngram"], "loads": ["closed 2", "bursty 50 2"],
    "workload": {"requests": 3, "max_tokens": 24}, "worker": {"threads": 1, "cache_tokens": 4096},
    "price_per_hour": 1.0,
}  # fmt: skip


def test_a_killed_study_goes_on_without_losing_or_repeating_a_cell(tmp_path):
    file, out = tmp_path / "study.json", tmp_path / "out"
    file.write_text(json.dumps(STUDY))
    study = StudyConfig.load(file)
    grid, store = cells(study), Store(out)
    assert len(grid) == 8
    command = [sys.executable, "-m", "pdspec", "study", "run", str(file), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as killed:
        deadline = time.monotonic() + 120
        while not any(map(store.has, grid)) and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGTERM)
        _, said = killed.communicate(timeout=60)
    before = {cell.id: store.path(cell).stat().st_mtime_ns for cell in grid if store.has(cell)}
    assert 0 < len(before) < len(grid), said
    assert not (out / "cells.parquet").exists()
    lines: list[str] = []
    result = run(study, out, progress=lines.append)
    assert result["measured"] == len(grid) - len(before)
    assert f"8 cells, {len(before)} of them complete" in lines[0] and "min left" in lines[-1]
    after = {cell.id: store.path(cell).stat().st_mtime_ns for cell in grid}
    assert {name: after[name] for name in before} == before, "what was complete is as it was"
    assert sorted(path.name for path in (out / "cells").iterdir()) == sorted(f"{name}.jsonl" for name in after)
    check_tables(out, grid)
    assert run(study, out, progress=lines.append)["measured"] == 0


def check_tables(out, grid):
    from pdspec.study.cells.tables import read

    rows = read(out / "requests.parquet")
    assert sorted((row["cell"], row["index"]) for row in rows) == sorted(
        (cell.id, index) for cell in grid for index in range(3)
    )
    assert all(row["output_tokens"] == 24 == sum(row["piece_tokens"]) for row in rows)
    assert all(len(row["piece_tokens"]) == row["verifications"] + 1 for row in rows)
    by_request = {}
    for row in rows:
        by_request.setdefault(row["index"], set()).add(tuple(row["token_ids"]))
    assert all(len(answers) == 1 for answers in by_request.values()), "whatever the cell, the answer is the same"
    table = read(out / "cells.parquet")
    assert [row["cell"] for row in table] == [cell.id for cell in grid]
    assert all(row["ttft_ms_p99"] is None and row["ttft_ms_p50"] > 0 for row in table)
    assert all((row["kv_bytes"] > 0) == (row["prefill"] > 0) and row["cost_per_million_tokens"] > 0 for row in table)
    assert json.loads((out / "study.json").read_text())["hardware"]["cores"] > 0
