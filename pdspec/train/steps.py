"""The steps of a training run: batches in a seeded order, a schedule, and a state from which a cut run goes on.

``state.pt`` holds weights, optimiser and progress, ``log.jsonl`` one line per step. With ``minutes`` the learning rate
falls with time, so the curve depends on the machine; with ``passes`` a resumed run repeats the unbroken one exactly.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pdspec.train.config import TrainConfig
from pdspec.train.examples import ExampleReader
from pdspec.train.optimisers import Optimisers
from pdspec.train.precision import product_type, products_in
from pdspec.train.recipe import Trainer

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


def run_steps(
    config: TrainConfig,
    trainer: Trainer,
    reader: ExampleReader,
    optimiser: Optimisers,
    progression: Progression,
    show: bool,
) -> None:
    """Trains until the schedule ends, saving on the way and at the end. Step s uses batch s of a seeded order."""
    dtype = product_type(config.precision)
    per_pass = reader.batches_per_pass(config.batch)
    total = config.steps or math.ceil(config.passes * per_pass)
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
            optimiser.zero_grad()
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
                save_state(config.work_folder / STATE, trainer, optimiser, progression)
                saved = time.monotonic()
    save_state(config.work_folder / STATE, trainer, optimiser, progression)


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


def forget_after(path: Path, step: int) -> None:
    """Drops log lines of steps that were lost with the run that made them."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:step]), encoding="utf-8")


def save_state(path: Path, trainer: Trainer, optimiser: Optimisers, progression: Progression) -> None:
    """Writes the state, whole or not at all."""
    state = {
        "parameters": {name: value.detach() for name, value in trainer.parameters.items()},
        "optimiser": optimiser.state_dict(),
        "target_ids": trainer.target_ids,
        "progression": vars(progression),
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_state(path: Path) -> dict[str, Any] | None:
    """What ``save_state`` wrote, None where there is nothing."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def loss_curve(losses: list[float], points: int = 10) -> list[tuple[int, float]]:
    """(step, mean loss of the steps since the point before), at most ``points`` of them."""
    edges = sorted({len(losses) * n // points for n in range(points + 1)})
    return [(b, round(sum(losses[a:b]) / (b - a), 4)) for a, b in pairwise(edges)]


def tail(losses: list[float], count: int = 50) -> float:
    """Mean of the last losses."""
    return sum(losses[-count:]) / max(1, len(losses[-count:]))
