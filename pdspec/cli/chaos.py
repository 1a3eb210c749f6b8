"""``pdspec chaos``: faults, bad peers and bad input on purpose. Exit status 1 when one gets through."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pdspec.cli.options import Json
from pdspec.cli.output import notes, only_json, print_json


def fuzz(
    cases: Annotated[int, typer.Option(min=100, help="Inputs in all.")] = 120_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same inputs.")] = 0,
    json: Json = False,
) -> None:
    """Broken frames, requests and settings: each is refused by a typed error; no crash, no hang, no leak."""
    with only_json(json):
        from pdspec.study import chaos_fuzz as study

        result = study.run(cases=cases, seed=seed, progress=notes().print)
    _finish(result, json)


def tls(json: Json = False) -> None:
    """TLS and tokens on: callers without, or with wrong or expired ones, are refused by router, workers and relay."""
    with only_json(json):
        from pdspec.study import chaos_tls as study

        result = study.run(progress=notes().print)
    _finish(result, json)


def _finish(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["ok"]:
        raise typer.Exit(1)
