"""The training loop: generate, train, evaluate, save; every part resumes where it was cut.

    card = train("eagle3", TrainConfig(model="smollm2-135m", out=Path("my-head"), prompts=(Path("questions.jsonl"),)))

In ``work`` (default ``out``/work): ``data/`` token stores, and the state and log of ``steps.py``. In ``out``: the head
(int8), its card.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pdspec.errors import ConfigError
from pdspec.model.loader import load_weights, resolve
from pdspec.spec.heads import TargetIdentity
from pdspec.train.card import write_card, write_curve
from pdspec.train.config import TrainConfig
from pdspec.train.data import Target, generate, load_target
from pdspec.train.evaluate import evaluate_head, held_out_answers
from pdspec.train.examples import ExampleReader
from pdspec.train.optimisers import Optimisers
from pdspec.train.plan import DataConfig, prompt_sources
from pdspec.train.precision import product_type
from pdspec.train.recipe import Recipe, Start, Trainer, recipe
from pdspec.train.steps import (
    LOG,
    STATE,
    Progression,
    forget_after,
    load_state,
    loss_curve,
    run_steps,
    tail,
)
from pdspec.train.store import TokenStore, data_counts
from pdspec.train.vocab import answer_counts, coverage

__all__ = ["TrainConfig", "make_data", "train"]
CURVE_POINTS = 150  # of the picture


def train(family: str, config: TrainConfig, *, show: bool = True) -> dict[str, Any]:
    """Generates, trains, saves, evaluates, writes the card; returns its figures. Raises ConfigError and UnknownName."""
    chosen = recipe(family)
    stores = make_data(config, show=show)
    trainer, progression, identity, reader = _train(chosen, config, stores, show)
    card: dict[str, Any] = {
        "title": chosen.TITLE,
        "model": config.model,
        "about": trainer.about(),
        "parameters": sum(value.numel() for value in trainer.parameters.values()),
        "command": _command(family, config),
        "data": data_counts(stores),
        "steps": progression.step,
        "tokens_seen": progression.tokens_seen,
        "ttt_steps": config.ttt,
        "learning_rate": config.learning_rate,
        "batch": config.batch,
        "loss": config.loss,
        "optimiser": config.optimiser,
        "precision": str(product_type(config.precision)).removeprefix("torch."),
        "training_seconds": round(progression.elapsed),
        "final_loss": round(tail(progression.losses), 4),
        "draft_vocab_coverage": round(reader.coverage, 4),
        "loss_curve": loss_curve(progression.losses),
    }
    trainer.save(config.out, identity, card)
    if config.evaluate:
        answers = held_out_answers(config, stores, show=show)
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        found = evaluate_head(config.out, [answers], family=family, model=config.model, cache_dir=config.cache_dir)
        card["acceptance"] = found.as_dict()
        trainer.save(config.out, identity, card)
    write_curve(config.out, loss_curve(progression.losses, CURVE_POINTS))
    write_card(config.out)
    return card


def _command(family: str, config: TrainConfig) -> str:
    length = f"--minutes {config.minutes:g}" if config.minutes else f"--passes {config.passes:g}"
    files = "".join(f" --prompts {path}" for path in config.prompts)
    return (
        f"pdspec train {family.replace('_', '-')} --model {config.model} --out {config.out}{files} "
        f"--tokens {config.tokens} --max-answer {config.max_answer} --self-share {config.self_share:g} {length} "
        f"--ttt {config.ttt} --draft-vocab {config.draft_vocab} --learning-rate {config.learning_rate:g} "
        f"--batch {config.batch} --loss {config.loss} --optimiser {config.optimiser} "
        f"--precision {config.precision} --seed {config.seed}"
    )


def make_data(config: TrainConfig, *, show: bool = True) -> list[TokenStore]:
    """The stores to train on, filled up to ``config.tokens`` unless ``config.data`` names them."""
    if config.data:
        return [TokenStore(folder) for folder in config.data]
    wanted = DataConfig(
        out=config.work_folder / "data",
        tokens=config.tokens,
        sources=prompt_sources(config.prompts, config.holdout),
        self_share=config.self_share,
        seed=config.seed,
        keep_hidden=config.keep_hidden,
        max_answer=config.max_answer,
        batch=config.generation_batch,
    )
    target = load_target(config.model, threads=config.threads, cache_dir=config.cache_dir)
    store = generate(wanted, target, show=show)
    target.runner.ops.close()
    return [store]


def _train(
    chosen: Recipe, config: TrainConfig, stores: list[TokenStore], show: bool
) -> tuple[Trainer, Progression, TargetIdentity, ExampleReader]:
    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    folder = config.work_folder
    folder.mkdir(parents=True, exist_ok=True)
    if not config.resume and (folder / STATE).exists():
        raise ConfigError(f"{folder} holds a run", field="out", remedy="resume it, or name another folder")
    state = load_state(folder / STATE) if config.resume else None
    start = start_of(config, stores, state)
    files, trainer = start.files, chosen.new(start)
    trainer.objective = config.loss
    optimiser = Optimisers(config.optimiser, trainer.parameters, config.learning_rate)
    progression = Progression()
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        progression = Progression(**state["progression"])
    forget_after(folder / LOG, progression.step)
    reader = reader_of(config, stores, coverage(start.counts, trainer.target_ids))
    run_steps(config, trainer, reader, optimiser, progression, show)
    identity = TargetIdentity.of(files.config, content_hash=files.content_hash, tokenizer_hash=files.tokenizer_hash)
    return trainer, progression, identity, reader


def start_of(config: TrainConfig, stores: Sequence[TokenStore], state: dict[str, Any] | None = None) -> Start:
    """What a recipe begins with. Raises ConfigError for stores of another target."""
    files = resolve(config.model, config.cache_dir)
    counts = np.zeros(files.config.vocab_size, np.int64)
    for store in stores:
        if store.meta["content_hash"] != files.content_hash:
            raise ConfigError(f"{store.folder} was written by another target", field="data", remedy="generate again")
        counts += answer_counts(store.read_all(hidden_rows=False), files.config.vocab_size)
    return Start(config=config, files=files, weights=load_weights(files, "float32"), counts=counts, state=state)


def reader_of(config: TrainConfig, stores: Sequence[TokenStore], share: float) -> ExampleReader:
    """Examples of ``stores``; the target is opened where they hold no hidden rows. ``share``: see ExampleReader."""

    def online() -> Target:
        return load_target(config.model, threads=config.threads, cache_dir=config.cache_dir)

    stored = all(store.has_hidden for store in stores)
    return ExampleReader(stores, config.max_length, share, None if stored else online)
