"""Every recipe of the training loop: what it trains is what its drafter runs, and it learns a memorised text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.prompts import Prompt
from pdspec.train.config import TrainConfig
from pdspec.train.data import generate, load_target
from pdspec.train.examples import ExampleReader
from pdspec.train.loop import train
from pdspec.train.packing import Example, Packed
from pdspec.train.plan import DataConfig
from pdspec.train.recipe import RECIPES, recipe
from pdspec.train.store import TokenStore
from pdspec.types import GenerateRequest, SamplingParams

MODEL = "tiny-5"
# One residual block on one hidden state cannot learn a text by heart; EAGLE-1 never sees its own outputs.
LEAST = {"medusa": (0.25, 0.25), "eagle1": (0.8, 0.5)}

PASSES = {"draft_model": 120.0}  # its layers start random


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    prompts = tuple(Prompt(id=str(n), category="", text=f"tell me of {n}") for n in range(4))
    config = DataConfig(
        out=tmp_path_factory.mktemp("data"), tokens=4 * 40, sources=(("file", prompts),), self_share=0.0,
        temperature=0.0, max_answer=40, batch=4, keep_hidden=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # what every CPU writes: no toy head learns any text
        patch.setenv("PDSPEC_KERNEL_FLAGS", "-DPDSPEC_NO_DOTS")
        return generate(config, load_target(MODEL, threads=1), show=False)


def run_config(out: Path, store: TokenStore, **changes: object) -> TrainConfig:
    values = {
        "model": MODEL, "out": out, "data": (store.folder,), "passes": 60.0, "batch": 4, "ttt": 2, "draft_vocab": 200,
        "threads": 1, "learning_rate": 4e-3, "evaluate": 0, "precision": "float32", **changes,
    }  # fmt: skip
    return TrainConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", RECIPES)
def test_a_memorised_text_is_accepted_by_the_drafter_that_serves_it(tmp_path, store, family):
    """Trained rows and drafted rows are the same rows: an overfitted head is accepted when it drafts, position by
    position, as teacher-forced evaluation says."""
    card = train(family, run_config(tmp_path / "head", store, passes=PASSES.get(family, 60.0)), show=False)
    assert card["loss_curve"][-1][1] < card["loss_curve"][0][1]
    sample = store.read(0)
    prompt, answer = sample.tokens[: sample.prompt_tokens].tolist(), sample.tokens[sample.prompt_tokens :].tolist()
    names = ("none", family)
    config = WorkerConfig(
        model=MODEL, dtype="float32", threads=1, drafter=family, drafters=names, cache_tokens=2048,
        heads={family: str(tmp_path / "head")},
    )  # fmt: skip
    generator = LocalGenerator(config)
    try:
        params = SamplingParams(max_tokens=len(answer), seed=0, ignore_eos=True)
        request = GenerateRequest(
            request_id="x", prompt_ids=tuple(prompt), sampling=params, drafter=family, tree="chain(2)"
        )
        chunks = list(generator.generate(request))
    finally:
        generator.resources.close()
    stats = chunks[-1].stats
    assert [token for chunk in chunks for token in chunk.token_ids] == answer
    assert stats is not None
    rates = [a / r for a, r in zip(stats.accepted_per_position, stats.reached_per_position, strict=True)]
    least = LEAST.get(family, (0.8, 0.6))
    assert rates[0] > least[0] and rates[1] > least[1]


@pytest.mark.parametrize("family", ["eagle1", "medusa", "mtp"])
def test_a_run_cut_half_way_repeats_the_unbroken_one(tmp_path, store, family):
    torch.manual_seed(3)
    whole = train(family, run_config(tmp_path / "whole", store, passes=6.0), show=False)
    if family == "eagle1":  # its noise is not part of the checkpoint
        assert len(whole["loss_curve"]) == 6
        return
    train(family, run_config(tmp_path / "cut", store, passes=6.0, max_steps=3), show=False)
    resumed = train(family, run_config(tmp_path / "cut", store, passes=6.0, resume=True), show=False)
    assert resumed["loss_curve"] == whole["loss_curve"]


@pytest.mark.parametrize("family", RECIPES)
def test_scores_are_of_the_rows_and_tokens_that_they_name(store, family, tmp_path):
    """Hits are counted where the best draft id is the target's best token of that very position."""
    train(family, run_config(tmp_path / "head", store, passes=1.0), show=False)
    from pdspec.model.loader import load_weights, resolve

    trainer = recipe(family).load(tmp_path / "head", load_weights(resolve(MODEL), "float32"))
    example = ExampleReader([store], 256, 0.0).example(1)
    with torch.no_grad():
        for depth, step in enumerate(trainer.steps([example], 2, rank=1)):
            assert step.ranked is not None
            rows = step.rows[:, 1]
            best = trainer.draft_ids[example.best[rows + 1 + depth]]
            np.testing.assert_array_equal(step.hits.numpy(), (step.ranked[:, 0] == best).numpy())
            assert int(rows.max()) + 2 + depth == len(example.tokens) - 1


def test_the_last_rows_of_the_last_sequence_may_ask_for_tokens_that_are_not_there():
    """A third module in series does; nobody sees what it reads."""
    example = Example(torch.arange(6), torch.arange(1, 7), torch.zeros(6, 2, 16), 3)
    packed = Packed([example])
    rows = torch.arange(4)
    assert packed.ids_after(rows, 0).tolist() == [1, 2, 3, 4]
    assert packed.ids_after(rows, 3).tolist() == [4, 5, 5, 5]
