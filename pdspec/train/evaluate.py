"""Acceptance of a head on answers it never saw, position by position.

Teacher-forced: the answer's own tokens are fed, and position d counts only where positions 1..d-1 were right, which is
then exactly what a greedy chain would have drafted. Answers are written by the target at temperature 0 (token = best
token), so *accepted* means what verification means at temperature 0. The head is evaluated as loaded (after int8).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pdspec.model.loader import load_weights, resolve
from pdspec.prompts import Prompt, load_prompts
from pdspec.repetition import repeated_share
from pdspec.train.config import TrainConfig
from pdspec.train.data import Target, generate, load_target
from pdspec.train.examples import ExampleReader
from pdspec.train.plan import DataConfig
from pdspec.train.recipe import RECIPES, Trainer, recipe
from pdspec.train.scoring import StepScores
from pdspec.train.store import TokenStore

TOP = 4
EVALUATION_TOKENS = 160  # of one answer
EVALUATION_SEED = 1_000_003  # added to the training seed


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """``top1[d]``/``top4[d]``: share of rows whose token at position d+1 is the draft's best / among its four best,
    given the same at every position before. ``chain_length``: mean output tokens per verification of a greedy chain
    as long as the list, from every position of the answers alike."""

    samples: int
    rows: int
    top1: tuple[float, ...]
    top4: tuple[float, ...]
    chain_length: float
    coverage: float  # share of answer tokens that the draft vocabulary holds
    repeated: float = 0.0  # share of answer tokens inside repeated 8-grams

    def as_dict(self) -> dict[str, Any]:
        """For JSON and cards."""
        return asdict(self)


def held_out_answers(config: TrainConfig, stores: Sequence[TokenStore], *, show: bool = True) -> TokenStore:
    """Greedy answers to ``config.evaluate`` prompts that were not trained on: the last ones of each prompt file, or
    without files prompts that the target makes up and that occur in none of ``stores``."""
    target = load_target(config.model, threads=config.threads, cache_dir=config.cache_dir)
    held = [prompt for path in config.prompts for prompt in load_prompts(path)[-config.holdout :] if config.holdout]
    folder, tokens = config.work_folder / "evaluation", config.evaluate * EVALUATION_TOKENS
    if held:
        held = [held[n * len(held) // config.evaluate] for n in range(config.evaluate)]
        store = write_answers(target, held, folder, max_answer=EVALUATION_TOKENS, show=show)
    else:
        wanted = DataConfig(
            out=folder,
            tokens=tokens // 2,
            self_share=1.0,
            temperature=0.0,
            max_answer=EVALUATION_TOKENS,
            batch=config.evaluate,
            seed=config.seed + EVALUATION_SEED,
            keep_hidden=True,
        )
        store = generate(wanted, target, known=set().union(*(one.keys for one in stores)), show=show)
    target.runner.ops.close()
    return store


def write_answers(
    target: Target,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    max_answer: int = 200,
    temperature: float = 0.0,
    batch: int = 16,
    show: bool = True,
) -> TokenStore:
    """The target's answers to ``prompts``, with hidden rows, in a store of their own."""
    config = DataConfig(
        out=out,
        tokens=max_answer * len(prompts) + 1,
        sources=(("evaluation", tuple(prompts)),),
        self_share=0.0,
        temperature=temperature,
        max_answer=max_answer,
        batch=batch,
        keep_hidden=True,
    )
    return generate(config, target, show=show)


def evaluate_head(
    folder: Path,
    stores: Sequence[TokenStore],
    *,
    family: str,
    model: str,
    depth: int = 0,
    max_length: int = 1024,
    cache_dir: str | None = None,
) -> Acceptance:
    """Acceptance of the head in ``folder`` on stored answers of ``model``, ``depth`` positions deep (0: as deep as its
    family is drafted)."""
    chosen = recipe(family)
    trainer = chosen.load(folder, load_weights(resolve(model, cache_dir), "float32"))
    return acceptance(trainer, ExampleReader(stores, max_length, 0.0), depth=depth or chosen.DEPTH)


def acceptance(trainer: Trainer, reader: ExampleReader, *, depth: int) -> Acceptance:
    """As ``evaluate_head``, of a head and examples in hand."""
    asked, right = torch.zeros(2, depth), torch.zeros(2, depth)
    rows = covered = 0
    answers: list[list[int]] = []
    chain = 0.0
    with torch.no_grad():
        for number in range(len(reader)):
            example = reader.example(number)
            answer = example.tokens[example.prompt_tokens + 1 :]
            answers.append(example.tokens[example.prompt_tokens :].tolist())
            hits = chain_hits(
                trainer.steps([example], depth, rank=TOP), example.tokens, trainer.draft_ids, example.prompt_tokens
            )
            rows, covered = rows + len(answer), covered + int((trainer.draft_ids[answer] >= 0).sum())
            for kind, table in enumerate(hits):
                alive = torch.ones(len(table), dtype=torch.bool)
                for d in range(depth):
                    known = table[:, d] >= 0
                    asked[kind, d] += int((alive & known).sum())
                    alive = alive & (table[:, d] == 1)
                    right[kind, d] += int(alive.sum())
    top1, top4 = (right / asked.clamp(min=1)).tolist()
    survival = 1.0
    for share in top1:
        survival *= share
        chain += survival
    return Acceptance(
        samples=len(reader),
        rows=rows,
        top1=tuple(round(x, 4) for x in top1),
        top4=tuple(round(x, 4) for x in top4),
        chain_length=round(1 + chain, 4),
        coverage=round(covered / max(1, rows), 4),
        repeated=round(repeated_share(answers), 4),
    )


def chain_hits(
    steps: Sequence[StepScores], tokens: torch.Tensor, draft_ids: torch.Tensor, prompt_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tables [rows, depth] of 1 (token is the best / among the best), 0, or -1 (no such token), of the rows that
    draft from a token of the answer (row i reads t_{i+1} with i+1 ≥ n)."""
    first = prompt_tokens - 1
    count = max(0, len(tokens) - 2 - first)
    tables = torch.full((2, count, len(steps)), -1, dtype=torch.int64)
    for d, step in enumerate(steps):
        if step.ranked is None:
            raise ValueError("steps were not ranked")
        rows = step.rows[:, 1]
        keep = rows >= first
        rows, ranked = rows[keep], step.ranked[keep]
        same = ranked == draft_ids[tokens[rows + 2 + d]][:, None]
        tables[0, rows - first, d] = same[:, 0].long()
        tables[1, rows - first, d] = same.any(1).long()
    return tables[0], tables[1]


def evaluate_on(
    folder: Path, prompts: Path, *, family: str, model: str, num_prompts: int, max_tokens: int = EVALUATION_TOKENS,
    temperature: float = 0.0, last: int = 0, threads: int = 0,
) -> Acceptance:  # fmt: skip
    """As ``evaluate_head``, on answers written for it to ``num_prompts`` prompts spread over a file (or its
    ``last``)."""
    chosen = load_prompts(prompts)[-last:]
    count = min(num_prompts, len(chosen))
    spread = [chosen[n * len(chosen) // count] for n in range(count)]
    with tempfile.TemporaryDirectory() as temporary:
        target = load_target(model, threads=threads)
        try:
            store = write_answers(target, spread, Path(temporary), max_answer=max_tokens, temperature=temperature)
        finally:
            target.runner.ops.close()
        return evaluate_head(folder, [store], family=family, model=model)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m pdspec.train.evaluate --head FOLDER --prompts FILE``: prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m pdspec.train.evaluate", description=main.__doc__)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--family", choices=RECIPES, default="eagle3")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--last", type=int, default=0, help="only the last prompts of the file")
    parser.add_argument("--num-prompts", type=int, default=40, help="spread over the file")
    parser.add_argument("--max-tokens", type=int, default=EVALUATION_TOKENS)
    chosen = parser.parse_args(arguments)
    found = evaluate_on(
        chosen.head, chosen.prompts, family=chosen.family, model=chosen.model, num_prompts=chosen.num_prompts,
        max_tokens=chosen.max_tokens, last=chosen.last,
    )  # fmt: skip
    print(json.dumps(found.as_dict()))


if __name__ == "__main__":
    main()
