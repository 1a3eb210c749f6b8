"""The training loop: generate, train, evaluate, save; every part resumes where it was cut.

    card = train("eagle3", TrainConfig(model="smollm2-135m", out=Path("my-head"), prompts=(Path("questions.jsonl"),)))

In ``work`` (default ``out``/work): ``data/`` token stores, ``state.pt`` weights, optimiser and cursor, ``log.jsonl``
one line per step. In ``out``: the head (int8), its card. With ``minutes`` the learning rate falls with time, so
the curve depends on the machine; with ``passes`` a run that was killed and resumed repeats the unbroken one exactly.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pdspec.errors import ConfigError
from pdspec.model.loader import load_weights, resolve
from pdspec.spec.heads import TargetIdentity
from pdspec.train.card import CardText, write_card
from pdspec.train.config import TrainConfig
from pdspec.train.data import Target, generate, load_target
from pdspec.train.evaluate import evaluate_head, held_out_answers
from pdspec.train.examples import ExampleReader
from pdspec.train.plan import DataConfig, prompt_sources
from pdspec.train.precision import product_type, products_in
from pdspec.train.recipe import Recipe, Start, Trainer, recipe
from pdspec.train.store import TokenStore, data_counts
from pdspec.train.vocab import answer_counts, coverage

__all__ = ["TrainConfig", "make_data", "train"]
STATE, LOG = "state.pt", "log.jsonl"
CLIP = 1.0
SAVE_SECONDS = 60.0


@dataclass(kw_only=True)
class Progression:
    """What a checkpoint holds besides tensors. ``elapsed`` seconds of training."""

    step: int = 0
    elapsed: float = 0.0
    tokens_seen: int = 0
    losses: list[float] = field(default_factory=list)


def train(family: str, config: TrainConfig, *, show: bool = True) -> dict[str, Any]:
    """Generates, trains, saves, evaluates, writes the card; returns its figures. Raises ConfigError and UnknownName."""
    chosen = recipe(family)
    stores = make_data(config, show=show)
    trainer, progression, identity, reader = _train(chosen, config, stores, show)
    card = {
        "data": data_counts(stores),
        "steps": progression.step,
        "tokens_seen": progression.tokens_seen,
        "ttt_steps": config.ttt,
        "learning_rate": config.learning_rate,
        "batch": config.batch,
        "loss": config.loss,
        "precision": str(product_type(config.precision)).removeprefix("torch."),
        "training_seconds": round(progression.elapsed),
        "final_loss": round(_tail(progression.losses), 4),
        "draft_vocab_coverage": round(reader.coverage, 4),
        "loss_curve": loss_curve(progression.losses),
    }
    trainer.save(config.out, identity, card)
    found = {}
    if config.evaluate:
        answers = held_out_answers(config, stores, show=show)
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        found["held out"] = evaluate_head(
            config.out, [answers], family=family, model=config.model, cache_dir=config.cache_dir
        )
        card["acceptance"] = found["held out"].as_dict()
        trainer.save(config.out, identity, card)
    text = CardText(
        title=chosen.TITLE, model=config.model, about=trainer.about(), card=card, evaluations=found,
        parameters=sum(value.numel() for value in trainer.parameters.values()), commands=[_command(family, config)],
    )  # fmt: skip
    write_card(config.out, text)
    return card


def _command(family: str, config: TrainConfig) -> str:
    length = f"--minutes {config.minutes:g}" if config.minutes else f"--passes {config.passes:g}"
    files = "".join(f" --prompts {path}" for path in config.prompts)
    return (
        f"pdspec train {family.replace('_', '-')} --model {config.model} --out {config.out}{files} "
        f"--tokens {config.tokens} {length} "
        f"--ttt {config.ttt} --draft-vocab {config.draft_vocab} --learning-rate {config.learning_rate:g} "
        f"--batch {config.batch} --loss {config.loss} --precision {config.precision} --seed {config.seed}"
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
    files = resolve(config.model, config.cache_dir)
    for store in stores:
        if store.meta["content_hash"] != files.content_hash:
            raise ConfigError(f"{store.folder} was written by another target", field="data", remedy="generate again")
    folder = config.work_folder
    folder.mkdir(parents=True, exist_ok=True)
    if not config.resume and (folder / STATE).exists():
        raise ConfigError(f"{folder} holds a run", field="out", remedy="resume it, or name another folder")
    state = _load_state(folder / STATE) if config.resume else None
    counts = np.zeros(files.config.vocab_size, np.int64)
    for store in stores:
        counts += answer_counts(store.read_all(hidden_rows=False), files.config.vocab_size)
    weights = load_weights(files, "float32")
    trainer = chosen.new(Start(config=config, files=files, weights=weights, counts=counts, state=state))
    trainer.objective = config.loss
    optimiser = torch.optim.AdamW(
        trainer.parameters.values(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    progression = Progression()
    if state is not None:
        optimiser.load_state_dict(state["optimiser"])
        progression = Progression(**state["progression"])
    _forget_after(folder / LOG, progression.step)
    online = None if all(store.has_hidden for store in stores) else _online(config)
    reader = ExampleReader(stores, config.max_length, coverage(counts, trainer.target_ids), online)
    run_steps(config, trainer, reader, optimiser, progression, show)
    identity = TargetIdentity.of(files.config, content_hash=files.content_hash, tokenizer_hash=files.tokenizer_hash)
    return trainer, progression, identity, reader


def _online(config: TrainConfig) -> Callable[[], Target]:
    return lambda: load_target(config.model, threads=config.threads, cache_dir=config.cache_dir)


def run_steps(
    config: TrainConfig,
    trainer: Trainer,
    reader: ExampleReader,
    optimiser: torch.optim.Optimizer,
    progression: Progression,
    show: bool,
) -> None:
    """Trains until the schedule ends, saving on the way and at the end. Step s uses batch s of a seeded order."""
    dtype = product_type(config.precision)
    per_pass = reader.batches_per_pass(config.batch)
    total = math.ceil(config.passes * per_pass)
    before, began, saved = progression.elapsed, time.monotonic(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("training", total=1.0)
        for examples in _ahead(reader, config, progression.step):
            share = progression.elapsed / (60 * config.minutes) if config.minutes else progression.step / total
            if share >= 1 or (config.max_steps and progression.step >= config.max_steps):
                break
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * schedule(share, config.warmup)
            with products_in(dtype):
                loss, scores = trainer.loss(examples, config.ttt)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), CLIP)
            optimiser.step()
            progression.step += 1
            progression.elapsed = before + time.monotonic() - began
            progression.tokens_seen += len(scores[0].rows)
            value = round(float(loss.detach()), 5)
            progression.losses.append(value)
            hits = [float((s.hits & s.counted).sum() / s.counted.sum().clamp(min=1)) for s in scores]
            _log(config.work_folder, progression, hits)
            shown = " ".join(f"{h:.2f}" for h in hits)
            bar.update(task, completed=share, description=f"step {progression.step} loss {value:.3f} best {shown}")
            if time.monotonic() - saved > SAVE_SECONDS:
                _save_state(config.work_folder / STATE, trainer, optimiser, progression)
                saved = time.monotonic()
    _save_state(config.work_folder / STATE, trainer, optimiser, progression)


def schedule(share: float, warmup: float) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to 1 %."""
    if share < warmup:
        return (share + 1e-3) / (warmup + 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - warmup) / (1 - warmup))))


def _ahead(reader: ExampleReader, config: TrainConfig, step: int) -> Iterator[list[Any]]:
    """Batches from ``step`` on. Stored ones are read while the one before is trained on; hidden rows that have to be
    computed would only take its cores."""
    if not reader.stored:
        while True:
            yield reader.batch(step, config.batch, config.seed)
            step += 1
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(reader.batch, step, config.batch, config.seed)
        while True:
            examples, step = coming.result(), step + 1
            coming = pool.submit(reader.batch, step, config.batch, config.seed)
            yield examples


def _log(folder: Path, progression: Progression, hits: list[float]) -> None:
    line = {
        "step": progression.step,
        "loss": progression.losses[-1],
        "tokens_seen": progression.tokens_seen,
        "elapsed": round(progression.elapsed, 1),
        "best_token": [round(h, 3) for h in hits],
    }
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _forget_after(path: Path, step: int) -> None:
    """Drops log lines of steps that were lost with the run that made them."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:step]), encoding="utf-8")


def _save_state(path: Path, trainer: Trainer, optimiser: torch.optim.Optimizer, progression: Progression) -> None:
    state = {
        "parameters": {name: value.detach() for name, value in trainer.parameters.items()},
        "optimiser": optimiser.state_dict(),
        "target_ids": trainer.target_ids,
        "progression": vars(progression),
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def _load_state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def loss_curve(losses: list[float], points: int = 10) -> list[tuple[int, float]]:
    """(step, mean loss of the steps since the point before), at most ``points`` of them."""
    edges = sorted({len(losses) * n // points for n in range(points + 1)})
    return [(b, round(sum(losses[a:b]) / (b - a), 4)) for a, b in pairwise(edges)]


def _tail(losses: list[float], count: int = 50) -> float:
    return sum(losses[-count:]) / max(1, len(losses[-count:]))
