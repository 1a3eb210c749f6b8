"""The loop resumes to the same curve, learns a memorised text, and evaluation counts what a chain would accept."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdspec.errors import ConfigError
from pdspec.prompts import Prompt
from pdspec.spec.eagle3.checkpoint import Head, load_head
from pdspec.train.data import generate, load_target
from pdspec.train.evaluate import chain_hits, evaluate_head, write_answers
from pdspec.train.loop import TrainConfig, train
from pdspec.train.optimisers import OPTIMISERS
from pdspec.train.plan import DataConfig
from pdspec.train.scoring import StepScores
from pdspec.train.steps import LOG, schedule
from pdspec.train.store import TokenStore

MODEL = "tiny-5"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    prompts = tuple(Prompt(id=str(n), category="", text=f"tell me of {n}") for n in range(9))
    config = DataConfig(
        out=tmp_path_factory.mktemp("data"),
        tokens=9 * 24,
        sources=(("file", prompts),),
        self_share=0.0,
        temperature=0.0,
        max_answer=24,
        batch=3,
        keep_hidden=True,
    )
    return generate(config, load_target(MODEL, threads=1), show=False)


def run_config(out: Path, store: TokenStore, **changes: object) -> TrainConfig:
    config = TrainConfig(
        model=MODEL,
        out=out,
        data=(store.folder,),
        passes=4,
        batch=3,
        ttt=3,
        draft_vocab=160,
        threads=1,
        learning_rate=2e-3,
        evaluate=0,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def train_head(config: TrainConfig, *, show: bool) -> Head:
    """The saved head."""
    assert json.loads(json.dumps(train("eagle3", config, show=show))) == load_head(config.out).card
    return load_head(config.out)


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in map(json.loads, (folder / "work" / LOG).read_text().splitlines())]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_run_cut_half_way_repeats_the_unbroken_one(tmp_path: Path, store: TokenStore, optimiser: str) -> None:
    whole = train_head(run_config(tmp_path / "whole", store, optimiser=optimiser), show=False)
    train_head(run_config(tmp_path / "cut", store, max_steps=5, optimiser=optimiser), show=False)
    assert len(curve(tmp_path / "cut")) == 5
    with (tmp_path / "cut" / "work" / LOG).open("a") as log:
        log.write('{"step": 6, "loss": 0.0}\n')  # a step that was lost with the run, after the last save
    resumed = train_head(run_config(tmp_path / "cut", store, resume=True, optimiser=optimiser), show=False)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 12
    assert resumed.fingerprint() == whole.fingerprint()
    written = sum(store.answer_tokens().values())
    assert whole.card["data"] == {"file": {"samples": 9, "answer_tokens": written, "share": 1.0}}
    assert whole.card["steps"] == 12
    with pytest.raises(ConfigError, match="holds a run"):
        train_head(run_config(tmp_path / "cut", store), show=False)


@pytest.mark.parametrize("save_seconds", [0.0, 60.0])
def test_a_run_killed_in_a_step_and_resumed_repeats_the_unbroken_one(
    tmp_path: Path, store: TokenStore, monkeypatch: pytest.MonkeyPatch, save_seconds: float
) -> None:
    """Nothing is saved when it dies: it goes on from the last save, or from the beginning."""
    train_head(run_config(tmp_path / "whole", store, ttt=2, passes=3), show=False)
    begun = itertools.count(1)

    def dies(share: float, warmup: float) -> float:
        if next(begun) == 6:
            raise KeyboardInterrupt
        return schedule(share, warmup)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pdspec.train.steps.schedule", dies)
        patch.setattr("pdspec.train.steps.SAVE_SECONDS", save_seconds)
        train_head(run_config(tmp_path / "cut", store, ttt=2, passes=3), show=False)
    assert len(curve(tmp_path / "cut")) == 5
    train_head(run_config(tmp_path / "cut", store, ttt=2, passes=3, resume=True), show=False)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 9


def test_a_recounted_vocabulary_keeps_the_rows_that_were_learnt(tmp_path: Path, store: TokenStore) -> None:
    first = train_head(run_config(tmp_path / "first", store, max_steps=1, draft_vocab=40), show=False)
    changes = {"head": tmp_path / "first", "recount": True, "draft_vocab": 60, "max_steps": 1, "learning_rate": 1e-9}
    again = train_head(run_config(tmp_path / "again", store, **changes), show=False)
    assert len(again.target_ids) == 60 and set(first.target_ids.tolist()) < set(again.target_ids.tolist())
    place = {token: row for row, token in enumerate(again.target_ids.tolist())}
    kept = again.tensors["lm_head.weight"][[place[token] for token in first.target_ids.tolist()]]
    torch.testing.assert_close(kept, first.tensors["lm_head.weight"], atol=1e-3, rtol=0)


def test_hidden_rows_computed_on_the_way_give_the_same_start(tmp_path: Path, store: TokenStore) -> None:
    """Stored rows are rounded to bf16, so the curves agree to that and no further."""
    train_head(run_config(tmp_path / "kept", store, max_steps=2), show=False)
    bare = TokenStore(tmp_path / "bare", {**store.meta, "hidden_row": []})
    for sample in store.read_all():
        bare.append(sample)
    train_head(run_config(tmp_path / "online", bare, max_steps=2), show=False)
    for (_, kept), (_, online) in zip(curve(tmp_path / "kept"), curve(tmp_path / "online"), strict=True):
        assert online == pytest.approx(kept, rel=0.02)


def test_a_memorised_text_is_accepted(tmp_path: Path, store: TokenStore) -> None:
    config = run_config(tmp_path / "head", store, passes=60, draft_vocab=272, learning_rate=4e-3)
    train_head(config, show=False)
    found = evaluate_head(tmp_path / "head", [store], family="eagle3", model=MODEL, depth=3)
    assert found.coverage == 1.0 and found.samples == 9
    assert found.top1[0] > 0.8 and found.top4[0] >= found.top1[0]
    assert found.chain_length > 1 + 0.8
    assert load_head(tmp_path / "head").target is not None


def test_one_call_writes_data_head_and_card(tmp_path: Path) -> None:
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(9)))
    config = TrainConfig(
        model=MODEL,
        out=tmp_path / "head",
        prompts=(prompts,),
        holdout=3,
        tokens=500,
        self_share=0.0,
        passes=1,
        draft_vocab=160,
        threads=1,
        evaluate=2,
    )
    head = train_head(config, show=False)
    assert list(head.card["data"]) == ["asked"] and head.card["acceptance"]["samples"] == 2
    trained = TokenStore(config.work_folder / "data").keys
    assert trained and not trained & TokenStore(config.work_folder / "evaluation").keys
    card = (config.out / "README.md").read_text()
    assert "| among best 4 |" in card and "pdspec train eagle3 --model tiny-5" in card and "| asked |" in card


def test_evaluation_answers_are_greedy_and_counted_apart(tmp_path: Path) -> None:
    target = load_target(MODEL, threads=1)
    answers = write_answers(target, [Prompt(id="1", category="", text="why?")], tmp_path, max_answer=6, show=False)
    (one,) = answers.read_all()
    start = one.prompt_tokens
    assert one.tokens[start:].tolist() == one.best[start - 1 : -1].tolist() and answers.answer_tokens() == {
        "evaluation": 6
    }


def test_chain_hits_of_a_hand_made_case() -> None:
    tokens = torch.tensor([0, 0, 5, 6, 7])  # prompt 0 0; answer 5 6 7; draft id = id - 5
    ids = torch.tensor([-1, -1, -1, -1, -1, 0, 1, 2])

    def step(rows: list[int], ranked: list[list[int]]) -> StepScores:
        where = torch.tensor([[0, row] for row in rows])
        ones = torch.ones(len(rows), dtype=torch.bool)
        return StepScores(where, torch.zeros(()), ones, ones, torch.tensor(ranked))

    # row 1 reads token 5 and predicts 6 (draft id 1), then 7 (draft id 2); row 2 reads 6 and predicts 7
    best, among = chain_hits(
        [step([0, 1, 2], [[0, 1], [1, 0], [0, 2]]), step([0, 1], [[0, 1], [0, 1]])], tokens, ids, 2
    )
    assert best.tolist() == [[1, 0], [0, -1]] and among.tolist() == [[1, 0], [1, -1]]


def test_the_schedule_rises_then_falls() -> None:
    shares = [n / 100 for n in range(101)]
    rates = [schedule(share, 0.1) for share in shares]
    assert rates[0] < 0.02 and max(rates) == rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_a_store_of_another_target_is_refused(tmp_path: Path, store: TokenStore) -> None:
    with pytest.raises(ConfigError, match="another target"):
        train_head(run_config(tmp_path, store, model="tiny-6"), show=False)
    with pytest.raises(ConfigError, match="passes or minutes"):
        run_config(tmp_path, store, minutes=1.0)


def test_a_head_with_tied_output_learns_none_and_may_follow_one_that_did(tmp_path: Path, store: TokenStore) -> None:
    train_head(run_config(tmp_path / "own", store, max_steps=1), show=False)
    changes = {"head": tmp_path / "own", "recount": True, "draft_vocab": 200, "tied_output": True}
    tied = train_head(run_config(tmp_path / "tied", store, **changes), show=False)
    assert tied.config.tied_output and len(tied.target_ids) == 200 and "lm_head.weight" not in tied.tensors
    again = load_head(tmp_path / "tied")
    assert again.config == tied.config and again.tensors.keys() == tied.tensors.keys()
    losses = [loss for _, loss in curve(tmp_path / "tied")]
    assert sum(losses[-3:]) < sum(losses[:3])
