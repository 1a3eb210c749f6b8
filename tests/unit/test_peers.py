"""Peers are found where they are named, spoken to in lines, and judged by what is promised."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from pdspec.errors import ConfigError, PdspecError, PeerLost
from pdspec.study.bench_mixed import DISAGGREGATED, verdict
from pdspec.study.bench_peers import Turn, _compare, _floors, _groups
from pdspec.study.peers import process
from pdspec.study.peers.find import find, probe
from pdspec.study.peers.process import Load, PeerProcess

DRIVERS = Path(process.__file__).parent / "drivers"
LOAD = Load(model="folder", gguf="", threads=1, batch=2, context=64)


def driver(tmp_path: Path, body: str) -> Path:
    """A driver that answers with what ``body`` defines."""
    script = tmp_path / "run_fake.py"
    head = f"import sys\nsys.path.insert(0, {str(DRIVERS)!r})\nfrom lines import serve\n"
    script.write_text(head + textwrap.dedent(body) + "\nserve(load)\n")
    return script


ECHO = """
    def load(request):
        print("what a library prints")
        def generate(prompts, max_tokens):
            if max_tokens == 13:
                raise ValueError("not thirteen")
            if max_tokens == 14:
                sys.exit(3)
            return [ids[:1] * max_tokens for ids in prompts], 0.5, 1.5
        return generate, {"threads": request["threads"]}
"""


def test_a_driver_answers_lines_whatever_its_libraries_print(tmp_path):
    with PeerProcess("transformers", sys.executable, LOAD, driver(tmp_path, ECHO)) as peer:
        assert peer.settings == {"threads": 1}
        took = peer.generate([(5, 6), (7,)], 3)
        assert took.tokens == ((5, 5, 5), (7, 7, 7))
        assert (took.decode_rate, took.throughput) == (4.0, 4.0)
        with pytest.raises(PdspecError, match="ValueError: not thirteen"):
            peer.generate([(5,)], 13)
        assert peer.generate([(5,)], 2).tokens == ((5, 5),)  # a refusal is no end
        with pytest.raises(PeerLost, match="broke off"):
            peer.generate([(5,)], 14)


def test_peers_are_named_by_flag_file_or_not_at_all(tmp_path):
    assert probe("/nowhere/python") == {}
    assert find({}, str(tmp_path)) == {"transformers": sys.executable}
    with pytest.raises(ConfigError, match="llama"):
        find({"lama.cpp": sys.executable}, str(tmp_path))
    with pytest.raises(ConfigError, match="has no vllm"):
        find({"vllm": sys.executable}, str(tmp_path))
    listed = tmp_path / "peers.yaml"
    listed.write_text(f"transformers: {sys.executable}\n")
    assert find({}, str(listed)) == {"transformers": sys.executable}
    with pytest.raises(ConfigError, match="there is no"):
        find({}, str(tmp_path / "absent"))


def test_rates_are_compared_in_turns_and_held_against_the_floors(monkeypatch):
    monkeypatch.setattr("pdspec.study.bench_peers._IDLE_S", 0.0)
    prompts = [((1, 2),), ((3, 4),)]
    order: list[str] = []

    def engine(name: str, rate: float, token: int = 9):
        def measure(group, max_tokens):
            order.append(name)
            return Turn(rate=rate, answers=tuple((token,) * max_tokens for _ in group))

        return measure

    measures = {
        "pdspec none": engine("none", 100.0), "pdspec ngram chain(2)": engine("ngram", 120.0),
        "llama.cpp": engine("llama", 100.0), "transformers": engine("hf", 40.0, token=8),
    }  # fmt: skip
    row = _compare(measures, prompts, 1, 4, 2, lambda text: None)
    assert row["best"] == "pdspec ngram chain(2)"
    engines = row["engines"]
    assert engines["llama.cpp"]["ratio_of_best"] == pytest.approx(1.2)
    assert engines["llama.cpp"]["same_beginning"] == 1.0 and engines["transformers"]["same_beginning"] == 0.0
    assert order[:4] == ["none", "ngram", "llama", "hf"] and order[4:8] == ["ngram", "llama", "hf", "none"]
    (floor,) = _floors("1", row)
    assert floor["peer"] == "llama.cpp" and floor["ok"]


def test_batches_are_as_large_as_asked():
    ids = [(n,) for n in range(5)]
    assert _groups(ids, 1, 3) == [[(0,)], [(1,)], [(2,)]]
    assert [len(group) for group in _groups(ids, 4, 8)] == [4, 4]


def test_the_setting_to_beat_answers_no_later():
    def row(p99: float, ttft: float) -> dict[str, float]:
        return {"itl_p99_ms": p99, "ttft_p50_ms": ttft}

    table = {DISAGGREGATED: row(12.0, 900.0), "colocated 16": row(20.0, 1500.0), "colocated 64": row(40.0, 850.0),
             "colocated 512": row(240.0, 500.0)}  # fmt: skip
    found = verdict(table)
    assert found["best_colocated"] == "colocated 64" and found["ok"]
    assert found["itl_p99_ratio"] == pytest.approx(0.3)
    nobody = verdict({DISAGGREGATED: row(1.0, 100.0), "colocated 16": row(20.0, 150.0)})
    assert not nobody["ok"] and nobody["as_quick"] == []
