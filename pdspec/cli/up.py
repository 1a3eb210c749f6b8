"""``pdspec up``: start a deployment and stay with it, or leave it running with ``--detach``."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Annotated

import typer

from pdspec.cli import detached
from pdspec.cli.options import (
    Config,
    Drafter,
    DraftPrefillRole,
    Dtype,
    HandoffPath,
    Heads,
    Model,
    Numerics,
    Plugins,
    Port,
    Sets,
    Threads,
    Tree,
    cluster_config,
    worker_flags,
)
from pdspec.cli.output import notes, spinner


def up(
    config: Config = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers; 0: decode workers prefill, too.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    model: Model = None,
    drafter: Drafter = None,
    tree: Tree = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    handoff: HandoffPath = None,
    draft_prefill: DraftPrefillRole = None,
    head: Heads = None,
    plugin: Plugins = None,
    threads: Threads = None,
    tp: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a worker (default: 1); of one role: --set prefill_worker.tp=2.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where the router listens (default: 127.0.0.1).")] = None,
    port: Port = None,
    http_port: Annotated[
        int | None, typer.Option(help="OpenAI's API over HTTP on this port; 0: any free one (default: none).")
    ] = None,
    http_host: Annotated[str | None, typer.Option(help="Where it listens (default: 127.0.0.1).")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: auto or host:port (default: an embedded one).")
    ] = None,
    sets: Sets = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when ready; `pdspec down` ends it.")] = False,
) -> None:
    """Start prefill workers, decode workers and the router under Ray; prints `ready` and the endpoint.

    With --http-port the URL of OpenAI's API comes one line before it."""
    chosen = cluster_config(
        config=config,
        sets=sets,
        top={"prefill": prefill, "decode": decode, "address": address},
        worker=worker_flags(
            model=model, drafter=drafter, dtype=dtype, numerics=numerics, tree=tree,
            draft_prefill=draft_prefill, heads=head, threads=threads, plugins=plugin,
        ) | {"tp": tp},
        router={"host": host, "port": port, "handoff": handoff},
        http={"host": http_host, "port": http_port},
    )  # fmt: skip
    for role, count in (("prefill", chosen.prefill), ("decode", chosen.decode)):
        if count:
            chosen.worker_config(role, 0)  # refuse bad settings of a role before anything starts
    console = notes()
    if detach:
        state = detached.start(chosen, console)
        print(f"ready {state.endpoint}", flush=True)
        console.print(f"logs: {state.log}; `pdspec down` ends it")
        return
    from pdspec.cluster import Cluster

    cluster, ended = Cluster(chosen), threading.Event()
    try:
        with spinner(console, "starting") as say:
            cluster.progress = say
            cluster.start()
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray set its own
            signal.signal(number, lambda *_: ended.set())
        if cluster.http:
            print(f"http{'s' if chosen.http.cert else ''}://{cluster.http}/v1", flush=True)
        print(f"ready {cluster.endpoint}", flush=True)
        if cluster.log_folder:
            console.print(f"logs of the workers: {cluster.log_folder}", soft_wrap=True)
        while not ended.wait(1.0):
            pass
        console.print("stopping …")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        cluster.stop()
