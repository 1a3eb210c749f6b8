"""``pdspec study ttt`` and ``draft-vocab``: what training choices are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdspec.cli.options import Json, Threads, default_model
from pdspec.cli.output import notes, only_json, print_json
from pdspec.errors import ConfigError

_Data = Annotated[list[Path] | None, typer.Option(help="Token stores of `pdspec train data`; may be repeated.")]


def ttt(
    out: Annotated[Path, typer.Option(help="Folder for data, logs and held-out answers.")],
    data: _Data = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="JSON lines of prompts; may be repeated.")] = None,
    holdout: Annotated[int, typer.Option(help="Last prompts of each file, to judge by.")] = 100,
    tokens: Annotated[int, typer.Option(help="Answer tokens to write, without --data.")] = 30_000,
    answers: Annotated[int, typer.Option(min=1, help="Held-out prompts, answered greedily.")] = 24,
    steps: Annotated[int, typer.Option(min=0, help="Of each variant.")] = 0,
    minutes: Annotated[float, typer.Option(min=0, help="Of each variant, instead of --steps.")] = 0.0,
    ttt: Annotated[int, typer.Option(min=2, help="Steps of training-time test.")] = 4,
    variants: Annotated[str, typer.Option(help="Comma separated (default: all).")] = "",
    draft_vocab: Annotated[int, typer.Option()] = 4096,
    learning_rate: Annotated[float, typer.Option()] = 6e-4,
    batch: Annotated[int, typer.Option(help="Samples of one step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of one sample.")] = 512,
    seed: Annotated[int, typer.Option()] = 0,
    model: Annotated[str | None, typer.Option(help="The target; see `pdspec models`.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """EAGLE-3 with and without training-time test, feature loss, drafted tokens and fused levels, on equal budgets."""
    if (steps > 0) == (minutes > 0):
        raise ConfigError("give steps or minutes", field="--steps", remedy="one of them, above 0")
    with only_json(json):
        from pdspec.study import ttt as study
        from pdspec.train.config import TrainConfig

        config = TrainConfig(
            model=model or default_model(), out=out, work=out, data=tuple(data or ()), prompts=tuple(prompts or ()),
            holdout=holdout, tokens=tokens, evaluate=answers, passes=0.0 if minutes else 1.0, minutes=minutes,
            steps=steps, ttt=ttt, draft_vocab=draft_vocab, learning_rate=learning_rate, batch=batch,
            max_length=max_length, seed=seed, threads=threads or 0, keep_hidden=True, max_answer=256,
        )  # fmt: skip
        chosen = [name.strip() for name in variants.split(",") if name.strip()]
        result = study.run(config=config, variants=chosen, progress=notes().print)
    if json:
        print_json(result)
        return
    for line in study.table(result):
        print(line)


def draft_vocab(
    data: _Data = None,
    sizes: Annotated[str, typer.Option(help="Comma separated.")] = "2048,4096,6144,8192,12288,16384",
    chain: Annotated[int, typer.Option(min=1, help="Draft tokens before a verification.")] = 4,
    acceptance: Annotated[float, typer.Option(min=0, max=1, help="Of a draft token inside the vocabulary.")] = 0.6,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; the median counts.")] = 50,
    model: Annotated[str | None, typer.Option(help="The target; see `pdspec models`.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Coverage and measured cost of draft vocabularies, and what they make of a chain's tokens per second."""
    if not data:
        raise ConfigError("no token store", field="--data", remedy="name one that `pdspec train data` wrote")
    with only_json(json):
        from pdspec.study import draft_vocab as study

        result = study.run(
            model=model or default_model(), data=data, sizes=[int(size) for size in sizes.split(",")], chain=chain,
            acceptance=acceptance, threads=threads or 0, rounds=rounds,
        )  # fmt: skip
    if json:
        print_json(result)
        return
    print(f"verification of {chain + 1} rows: {result['verify_ms']:.3f} ms; {result['answer_tokens']} answer tokens")
    for row in result["rows"]:
        print(f"{row['draft_vocab']:6d} ids  coverage {row['coverage']:.4f}  draft row {row['draft_ms']:.3f} ms  "
              f"{row['tokens_per_second']:.1f} tokens/s{'  <- best' if row['draft_vocab'] == result['best'] else ''}")
