"""``pdspec study ttt``: what each part of EAGLE-3's recipe is worth, every variant trained on the same budget.

All start from the same weights, see the same batches in the same order, and are judged position by position on greedy
answers to prompts that none was trained on: the share of tokens that a chain's position d drafts right, given that all
positions before were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from pdspec.errors import ConfigError
from pdspec.study.ways import Progress
from pdspec.telemetry import usable_cores
from pdspec.train.config import TrainConfig
from pdspec.train.eagle3 import Eagle3Trainer, Variation
from pdspec.train.evaluate import Acceptance, acceptance, held_out_answers
from pdspec.train.examples import ExampleReader
from pdspec.train.loop import make_data, reader_of, start_of
from pdspec.train.optimisers import Optimisers
from pdspec.train.recipe import Start, recipe
from pdspec.train.steps import STATE, Progression, run_steps, tail
from pdspec.train.vocab import coverage

FEATURES = 10.0  # EAGLE-1 weighs features ten times as much as tokens (2401.15077, w_cls = 0.1)
DEPTH = 5
VARIANTS: dict[str, tuple[bool, Variation]] = {  # name: whether it is trained on its own outputs, and how it differs
    "training-time test": (True, Variation()),
    "one step": (False, Variation()),
    "later steps read drafted tokens": (True, Variation(self_drafted=True)),
    "feature loss besides": (True, Variation(feature_weight=FEATURES)),
    "one step, feature loss besides": (False, Variation(feature_weight=FEATURES)),
    "last level alone": (True, Variation(last_level=True)),
}


def run(*, config: TrainConfig, variants: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Trains and judges ``variants`` (empty: all). ``config.steps`` or ``config.minutes`` is the budget of each.
    Raises ConfigError."""
    names = tuple(variants) or tuple(VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise ConfigError(f"no variant {unknown[0]!r}", field="variants", remedy="choose of " + ", ".join(VARIANTS))
    torch.set_num_threads(config.threads or usable_cores())
    stores = make_data(config)
    answers = held_out_answers(config, stores)
    start = start_of(config, stores)
    judged = ExampleReader([answers], config.max_length, 0.0)
    rows = []
    for number, name in enumerate(names):
        progress(f"training: {name}")
        rows.append(_row(name, _own_folder(config, number), start, stores, judged))
    return {"model": config.model, "ttt_steps": config.ttt, "answers": len(judged), "rows": rows}


def _own_folder(config: TrainConfig, number: int) -> TrainConfig:
    """A folder of its own for a variant's state and log; a state of an earlier study there is dropped."""
    folder = config.work_folder / f"variant-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*"):
        left.unlink()
    return replace(config, work=folder)


def _row(
    name: str, config: TrainConfig, start: Start, stores: Sequence[Any], judged: ExampleReader
) -> dict[str, Any]:
    own_outputs, variation = VARIANTS[name]
    config = config if own_outputs else replace(config, ttt=1)
    trainer = recipe("eagle3").new(start)
    assert isinstance(trainer, Eagle3Trainer)
    trainer.variation, trainer.objective = variation, config.loss
    reader, progression = reader_of(config, stores, coverage(start.counts, trainer.target_ids)), Progression()
    optimiser = Optimisers(config.optimiser, trainer.parameters, config.learning_rate)
    run_steps(config, trainer, reader, optimiser, progression, True)
    (config.work_folder / STATE).unlink()
    trainer.variation = replace(variation, self_drafted=False)  # judged rows read what was right
    return {"variant": name, **_figures(acceptance(trainer, judged, depth=DEPTH)), "steps": progression.step,
            "seconds": round(progression.elapsed, 1), "loss": round(tail(progression.losses), 4)}  # fmt: skip


def _figures(found: Acceptance) -> dict[str, Any]:
    return {"positions": list(found.top1), "chain_length": found.chain_length, "rows": found.rows}


def table(result: dict[str, Any]) -> list[str]:
    """The result as lines of a Markdown table."""
    head = ["variant", "steps", *(f"position {d + 1}" for d in range(DEPTH)), "tokens per verification"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in result["rows"]:
        cells = [row["variant"], str(row["steps"]), *(f"{share:.3f}" for share in row["positions"]),
                 f"{row['chain_length']:.2f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines
