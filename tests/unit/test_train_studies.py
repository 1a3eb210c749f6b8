"""The studies of training choices: every variant is trained and judged alike, costs are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pdspec.errors import ConfigError
from pdspec.prompts import Prompt
from pdspec.study import draft_vocab, ttt
from pdspec.train.config import TrainConfig
from pdspec.train.data import generate, load_target
from pdspec.train.plan import DataConfig
from pdspec.train.store import TokenStore

MODEL = "tiny-5"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    prompts = tuple(Prompt(id=str(n), category="", text=f"tell me of {n}") for n in range(8))
    config = DataConfig(out=tmp_path_factory.mktemp("data"), tokens=8 * 24, sources=(("file", prompts),),
                        self_share=0.0, temperature=0.0, max_answer=24, batch=4, keep_hidden=True)  # fmt: skip
    return generate(config, load_target(MODEL, threads=1), show=False)


def test_every_variant_is_trained_from_the_same_start_and_judged(tmp_path: Path, store: TokenStore) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(f'{{"prompt": "say {n}"}}\n' for n in range(3)))
    config = TrainConfig(
        model=MODEL, out=tmp_path, work=tmp_path, data=(store.folder,), prompts=(asked,), holdout=3, evaluate=2,
        steps=3, ttt=3, draft_vocab=160, batch=4, threads=1, precision="float32",
    )  # fmt: skip
    result = ttt.run(config=config, variants=(), progress=lambda text: None)
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == list(ttt.VARIANTS) and {row["steps"] for row in rows.values()} == {3}
    assert all(len(row["positions"]) == ttt.DEPTH and row["chain_length"] >= 1 for row in rows.values())
    assert len({row["loss"] for row in rows.values()}) == len(rows)  # each differs in what it is trained on
    assert len(ttt.table(result)) == 2 + len(rows)
    again = ttt.run(config=config, variants=["one step"], progress=lambda text: None)
    assert {**again["rows"][0], "seconds": 0} == {**rows["one step"], "seconds": 0}
    with pytest.raises(ConfigError, match="two steps"):
        ttt.run(config=config, variants=["two steps"], progress=lambda text: None)


def test_a_larger_draft_vocabulary_covers_more_and_its_gain_follows_the_measured_times(store: TokenStore) -> None:
    torch.set_num_threads(1)
    result = draft_vocab.run(
        model=MODEL, data=[store.folder], sizes=[8, 160], chain=2, acceptance=0.5, threads=1, rounds=3
    )
    small, large = result["rows"]
    assert small["coverage"] < large["coverage"] and small["draft_ms"] > 0
    inside = 0.5 * large["coverage"]
    expected = (1 + inside + inside**2) / (result["verify_ms"] + 2 * large["draft_ms"]) * 1000
    assert large["tokens_per_second"] == pytest.approx(expected, rel=1e-2)
    assert result["best"] in (8, 160)
    with pytest.raises(ConfigError, match="1000000"):
        draft_vocab.run(model=MODEL, data=[store.folder], sizes=[10**6], chain=2, acceptance=0.5, threads=1, rounds=1)
