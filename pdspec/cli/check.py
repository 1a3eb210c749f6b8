"""``pdspec check``: the proofs, run on this machine. Exit status 1 when one fails."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pdspec.cli.options import Dtype, Heads, Json, Model, Numerics, Prompts, worker_flags
from pdspec.cli.output import notes, only_json, print_json


def parity(
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from the file.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    transformers: Annotated[bool, typer.Option(help="Audit greedy answers against transformers, too.")] = True,
    json: Json = False,
) -> None:
    """Every drafter, tree and handoff against `--local --drafter none`: token for token, or audited in fast mode."""
    with only_json(json):
        from pdspec.study import parity as study

        result = study.run(
            worker=_given(model=model, dtype=dtype, numerics=numerics, heads=head),
            prompts=prompts, num_prompts=num_prompts, max_tokens=max_tokens, transformers=transformers,
            progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


def handoff(
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from the file.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    json: Json = False,
) -> None:
    """Proposals and accepted counts through the handoff against one process, in every path and setting."""
    with only_json(json):
        from pdspec.study import handoff_check as study

        result = study.run(
            worker=_given(model=model, dtype=dtype, numerics=numerics, heads=head),
            prompts=prompts, num_prompts=num_prompts, max_tokens=max_tokens, progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in worker_flags(**flags).items() if value is not None}


def _finish(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["ok"]:
        raise typer.Exit(1)
