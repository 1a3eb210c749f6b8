"""``pdspec chaos`` with ``drain`` and ``soak``: the days of a deployment in short. Exit status 1 when one shows."""

from __future__ import annotations

from typing import Annotated

import typer

from pdspec.cli.chaos_faults import finish
from pdspec.cli.options import Json
from pdspec.cli.output import notes, only_json


def drain(
    clients: Annotated[int, typer.Option(min=1, help="At once, without a break.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every process is restarted.")] = 1,
    drain_s: Annotated[float, typer.Option(min=0, help="That answers may take to end where they are.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of requests.")] = 0,
    json: Json = False,
) -> None:
    """Every process is restarted under load, and a worker switches its role: no request is lost, no token differs."""
    with only_json(json):
        from pdspec.study import chaos, chaos_drain

        plan = chaos_drain.Plan(clients=clients, rounds=rounds, drain_s=drain_s, seed=seed)
        worker = chaos.worker_config(chaos.Plan(tokens=plan.tokens, clients=clients)).replace(log_level="info")
        result = chaos_drain.run(worker, plan, progress=notes().print)
    finish(result, json)


def soak(
    minutes: Annotated[float, typer.Option(min=0.1, help="Of load.")] = 30.0,
    load: Annotated[float, typer.Option(min=0.1, max=1.0, help="Share of what the deployment can serve.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of requests and their moments.")] = 0,
    json: Json = False,
) -> None:
    """Requests of every kind at a share of capacity; memory and file descriptors of every process stay flat."""
    with only_json(json):
        from pdspec.study import chaos, chaos_soak

        plan = chaos_soak.Plan(minutes=minutes, load=load, seed=seed)
        worker = chaos.worker_config(chaos.Plan(tokens=plan.tokens)).replace(log_level="warning")
        result = chaos_soak.run(worker, plan, progress=notes().print)
    finish(result, json)
