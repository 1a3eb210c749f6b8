"""``pdspec train data``: answers that the target writes, to train heads on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdspec.cli.options import Json, Threads, default_model
from pdspec.cli.output import only_json, print_json
from pdspec.errors import ConfigError


def data(
    out: Annotated[Path, typer.Option(help="Folder of the token store.")],
    model: Annotated[str | None, typer.Option(help="The target; see `pdspec models`.")] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="JSON lines of prompts to answer; may be repeated.")
    ] = None,
    holdout: Annotated[int, typer.Option(min=0, help="Last prompts of each file, left out.")] = 100,
    tokens: Annotated[int, typer.Option(min=1, help="Answer tokens in all; a larger number goes on.")] = 300_000,
    self_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples whose question the target makes up.")
    ] = 0.6,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers.")] = 0.7,
    max_answer: Annotated[int, typer.Option(min=1, help="Tokens of one answer.")] = 400,
    max_prompt: Annotated[int, typer.Option(min=16, help="Tokens of a prompt; longer ones are left out.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 32,
    seed: Annotated[int, typer.Option()] = 0,
    keep_hidden: Annotated[
        bool, typer.Option("--keep-hidden", help="Store hidden rows, too (4 x hidden size x 2 bytes a token).")
    ] = False,
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the store in OUT.")] = False,
    json: Json = False,
) -> None:
    """Answers written by the target to prompts of files and to prompts that it makes up; duplicates are dropped."""
    with only_json(json):
        from pdspec.train.data import generate, load_target
        from pdspec.train.plan import DataConfig, prompt_sources
        from pdspec.train.store import META, data_counts

        if not resume and (out / META).exists():
            raise ConfigError(f"{out} holds samples", field="out", remedy="add --resume, or name another folder")
        config = DataConfig(
            out=out, tokens=tokens, sources=prompt_sources(prompts or (), holdout), self_share=self_share,
            temperature=temperature, max_answer=max_answer, max_prompt=max_prompt, batch=batch, seed=seed,
            keep_hidden=keep_hidden,
        )  # fmt: skip
        target = load_target(model or default_model(), threads=threads or 0)
        try:
            counts = data_counts([generate(config, target)])
        finally:
            target.runner.ops.close()
    if json:
        print_json({"out": str(out), "sources": counts})
        return
    for name, one in sorted(counts.items()):
        print(f"{name}: {one['samples']} samples, {one['answer_tokens']} answer tokens, {one['share']:.1%}")
