"""``pdspec chaos`` with ``kill-decode`` and ``detect``: processes die on purpose. Exit status 1 when it shows."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import typer

from pdspec.cli.options import Drafter, Dtype, Heads, Json, Model, Numerics, Threads, given_flags
from pdspec.cli.output import notes, only_json, print_json


def chaos(
    context: typer.Context,
    requests: Annotated[int, typer.Option(min=20, help="In all; faults come in proportion.")] = 500,
    seed: Annotated[int, typer.Option(help="Of requests and faults.")] = 0,
    drafters: Annotated[str, typer.Option(help="Comma separated (default: every family).")] = "",
    tokens: Annotated[int, typer.Option(min=32, help="Of the longest answers.")] = 320,
    clients: Annotated[int, typer.Option(min=1, help="At once.")] = 24,
    deadline_s: Annotated[float, typer.Option(min=5, help="Of each request.")] = 120.0,
    model: Annotated[str, typer.Option(help="Alias, hub id or folder.")] = "tiny",
    json: Json = False,
) -> None:
    """Faults on purpose. Without a command: kills, stops, cancels, damaged frames and full pools at random, on 2
    prefill and 2 decode workers, every answer compared with plain decoding's."""
    if context.invoked_subcommand:
        return
    with only_json(json):
        from pdspec.study import chaos as study

        plan = study.Plan(
            requests=requests, seed=seed, tokens=tokens, clients=clients, deadline_s=deadline_s, model=model
        )
        if names := tuple(name.strip() for name in drafters.split(",") if name.strip()):
            plan = dataclasses.replace(plan, drafters=names)
        result = study.run(plan, progress=notes().print)
    finish(result, json)


def kill_decode(
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    drafter: Drafter = None,
    head: Heads = None,
    threads: Threads = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Of the answer.")] = 512,
    kill_after: Annotated[int, typer.Option(min=1, help="Tokens.")] = 200,
    json: Json = False,
) -> None:
    """SIGKILL of the decode worker in mid-answer: one unbroken stream, the same tokens, a pause of at most 2 s."""
    with only_json(json):
        from pdspec.config import WorkerConfig
        from pdspec.study import chaos_kill as study

        flags = given_flags(model=model, dtype=dtype, numerics=numerics, drafter=drafter, heads=head, threads=threads)
        result = study.kill_decode(
            worker=WorkerConfig.from_mapping(flags), max_tokens=max_tokens, kill_after=kill_after,
            progress=notes().print,
        )  # fmt: skip
    finish(result, json)


def detect(
    concurrent: Annotated[int, typer.Option(min=1, help="Requests that are cancelled together.")] = 64,
    json: Json = False,
) -> None:
    """How soon a killed or stopped worker is routed around, serves again, and cancelled requests' pages are free."""
    with only_json(json):
        from pdspec.study import chaos_kill as study

        result = study.detect(worker=study.tiny_config(), concurrent=concurrent, progress=notes().print)
    finish(result, json)


def finish(result: dict[str, Any], json: bool) -> None:
    """Print a study's result; exit status 1 unless it is ``ok``."""
    if json:
        print_json(_finite(result))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["ok"]:
        raise typer.Exit(1)


def _finite(value: Any) -> Any:
    """JSON has no infinity: what never happened is null."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
