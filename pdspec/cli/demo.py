"""``pdspec demo``: a one-box cluster answers a prompt before your eyes, then says what it took."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from pdspec.cli.options import Drafter, Dtype, Heads, Model, Numerics, Threads, cluster_config, worker_flags
from pdspec.cli.output import notes, size, spinner
from pdspec.client import Answer, RouterClient
from pdspec.types import SamplingParams, UserRequest

PROMPT = "Explain, step by step, how a bicycle stays upright while it is moving."
WARM_UP_TOKENS = 8


def demo(
    prompt: Annotated[str, typer.Option(help="The user's message.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    model: Model = None,
    drafter: Drafter = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    threads: Threads = None,
) -> None:
    """One prefill worker, one decode worker and the router on this machine answer a prompt through gRPC."""
    began, console, out = time.monotonic(), notes(), Console(highlight=False)
    flags = worker_flags(model=model, drafter=drafter, dtype=dtype, numerics=numerics, heads=head, threads=threads)
    config = cluster_config(top={"prefill": 1, "decode": 1}, worker=flags, router={"port": 0})
    config.worker_config("decode", 0)
    name = config.worker.model
    from pdspec.model.hub import locate

    locate(name, config.worker.cache_dir or None)  # with a progress bar the first time
    from pdspec.cluster import Cluster

    cluster = Cluster(config)
    try:
        with spinner(console, "starting") as say:
            cluster.progress = say
            cluster.start()
            client = RouterClient(cluster.endpoint)
            say("warming up")
            chosen = config.worker.drafter
            for handoff, drafter in _cases(chosen):
                client.generate(_request("Hi", WARM_UP_TOKENS, drafter, handoff))
        processes = cluster.process_ids()
        started = time.monotonic() - began
        out.print(f"[bold]{name}[/] · router {cluster.endpoint} · ready after {started:.1f} s")
        out.print(f"[bold cyan]{prompt}[/]")
        answers: dict[tuple[str, str], Answer] = {}
        for case in _cases(chosen):
            show = None if answers else lambda text: print(text, end="", flush=True)
            with spinner(console, f"the same prompt, drafter {case[1]}, {case[0]}") if answers else _quiet():
                answers[case] = client.generate(_request(prompt, max_tokens, case[1], case[0]), on_text=show)
            if show:
                print("\n", flush=True)
        client.close()
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        cluster.stop()
    out.print(table(answers, processes, chosen))
    same = len({answer.token_ids for answer in answers.values()}) == 1
    out.print("all answers have the same tokens" if same else "[bold red]the answers differ[/]")
    out.print(f"everything stopped after {time.monotonic() - began:.1f} s", style="dim")
    if not same and config.worker.numerics != "fast":
        raise typer.Exit(1)


def table(answers: dict[tuple[str, str], Answer], processes: dict[str, int], drafter: str) -> Table:
    """One column per answer. ``processes`` says which process each worker is."""
    plain = answers.get(("direct", "none"))
    titles = (f"{name}, {handoff}" for handoff, name in answers)
    rows = Table(Column("", no_wrap=True), *titles, box=None, header_style="bold")
    for column in rows.columns[1:]:
        column.justify = "right"

    def row(title: str, *cells: str) -> None:
        rows.add_row(title, *cells)

    found = list(answers.values())
    row("time to first token", *(f"{a.ttft_ms:.0f} ms" for a in found))
    row("time per output token", *(f"{a.tpot_ms:.2f} ms" for a in found))
    row("tokens per verification", *(f"{a.stats.acceptance_length:.2f}" for a in found))
    row("target KV moved", *(size(a.stats.kv_bytes) for a in found))
    row("draft KV moved", *(size(a.stats.draft_kv_bytes) for a in found))
    row("prefilled by (process)", *(_worker(a.stats.prefill_worker, processes) for a in found))
    row("decoded by (process)", *(_worker(a.stats.decode_worker, processes) for a in found))
    row("speed", *(f"{1e3 / a.tpot_ms:.1f} tokens/s" if a.tpot_ms else "–" for a in found))
    if plain and plain.tpot_ms and drafter != "none":
        ratios = (f"{plain.tpot_ms / a.tpot_ms:.2f}×" if a.tpot_ms else "–" for a in found)
        row("against plain decoding", *ratios)
    return rows


def _cases(drafter: str) -> list[tuple[str, str]]:
    cases = [("direct", drafter), ("relay", drafter), ("direct", "none")]
    return list(dict.fromkeys(cases))


def _request(prompt: str, max_tokens: int, drafter: str, handoff: str) -> UserRequest:
    return UserRequest(
        chat=(("user", prompt),), sampling=SamplingParams(max_tokens=max_tokens), drafter=drafter, handoff=handoff
    )


def _worker(name: str, processes: dict[str, int]) -> str:
    return f"{name} ({processes[name]})" if name in processes else name


def _quiet():  # type: ignore[no-untyped-def]
    import contextlib

    return contextlib.nullcontext()
