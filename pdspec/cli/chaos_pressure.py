"""``pdspec chaos`` with ``pressure`` and ``overload``: more work than there is room or time for. Exit status 1 when it
shows."""

from __future__ import annotations

from typing import Annotated

import typer

from pdspec.cli.chaos_faults import finish
from pdspec.cli.options import Drafter, Dtype, Heads, Json, Model, Numerics, Threads, given_flags
from pdspec.cli.output import notes, only_json


def pressure(
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    drafter: Drafter = None,
    head: Heads = None,
    threads: Threads = None,
    answers: Annotated[int, typer.Option(min=4, help="At once.")] = 64,
    holds: Annotated[int, typer.Option(min=2, help="Whole answers that the KV pool holds.")] = 16,
    tokens: Annotated[int, typer.Option(min=32, help="Of each answer.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Of every concurrency, in turn.")] = 2,
    json: Json = False,
) -> None:
    """Long answers in a pool that holds a quarter of them: all end, the same tokens, about the best throughput."""
    with only_json(json):
        from pdspec.study import chaos_pressure as study
        from pdspec.study.chaos_kill import tiny_config

        flags = given_flags(model=model, dtype=dtype, numerics=numerics, drafter=drafter, heads=head, threads=threads)
        plan = study.Plan(
            answers=answers, holds=holds, tokens=tokens, rounds=rounds, fixed=tuple(sorted({max(1, holds // 4),
            max(1, holds // 2), holds})),
        )  # fmt: skip
        worker = tiny_config().replace(**flags) if not model else tiny_config().replace(heads={}, **flags)
        result = study.run(worker, plan, notes().print)
    finish(result, json)


def overload(
    model: Model = None,
    dtype: Dtype = None,
    drafter: Drafter = None,
    head: Heads = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=5, help="Of overload.")] = 60.0,
    times: Annotated[float, typer.Option(min=1, help="Requests for each one that can be served.")] = 4.0,
    clients: Annotated[int, typer.Option(min=1, help="At once, to find the capacity.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="Of each answer.")] = 96,
    json: Json = False,
) -> None:
    """More requests than can be served: the excess is refused at once, and as many answers come in time as before."""
    with only_json(json):
        from pdspec.study import chaos_overload as study
        from pdspec.study.chaos_kill import tiny_config

        flags = given_flags(model=model, dtype=dtype, drafter=drafter, heads=head, threads=threads)
        worker = tiny_config().replace(**flags) if not model else tiny_config().replace(heads={}, **flags)
        plan = study.Plan(clients=clients, times=times, seconds=seconds, tokens=tokens)
        result = study.run(worker, plan, notes().print)
    finish(result, json)
