"""``pdspec bench peers``, ``router``, ``mixed``, ``step``, ``short``: other engines, many requests, all in short."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from pdspec.cli.options import Dtype, Json, Model, Threads, default_model, given_flags, numbers, pairs
from pdspec.cli.output import notes, only_json, print_json
from pdspec.cli.runs import Shared, shared_options


@shared_options(num_prompts=16, max_tokens=128)
def peers(
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="NAME=PYTHON: llama.cpp, vllm, transformers; may be repeated.")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="Folder of virtual environments, or file of NAME: PYTHON.", envvar="PDSPEC_PEERS")
    ] = "",
    only: Annotated[str, typer.Option(help="Peers to run, comma separated (default: all that are found).")] = "",
    drafters: Annotated[str, typer.Option(help="Tried beside none, comma separated.")] = "ngram,eagle3",
    batches: Annotated[str, typer.Option(help="Prompts at once, comma separated.")] = "1,8,16",
    runs: Annotated[int, typer.Option(min=1, help="Interleaved runs; the median counts.")] = 5,
    *,
    shared: Shared,
) -> None:
    """Tokens per second beside llama.cpp, vLLM and transformers: same weights, prompts and number of tokens."""
    with only_json(shared.json):
        from pdspec.study import bench_peers as study
        from pdspec.study.heads import families

        result = study.run(
            worker=shared.worker, given=pairs(peer, "peer", "NAME=PYTHON"), where=peers,
            only=[name.strip() for name in only.split(",") if name.strip()], drafters=families(drafters),
            batches=numbers(batches, "batches"), **shared.asked(), runs=runs, progress=notes().print,
        )  # fmt: skip
    if not shared.json:
        for size, row in result["batch"].items():
            for name, one in row["engines"].items():
                rate, ratio = one["tokens_per_second"], one["ratio_of_best"]
                print(f"batch {size}: {name} {rate:.1f} tokens/s; pdspec's best makes {ratio:.2f} times as many")
    _finish(result, shared.json)


def router(
    model: Model = None,
    streams: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 64,
    chunks: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 400,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a request whose first token is timed.")] = 512,
    requests: Annotated[int, typer.Option(min=1, help="So timed, each way.")] = 400,
    runs: Annotated[int, typer.Option(min=1, help="The median counts.")] = 5,
    json: Json = False,
) -> None:
    """What the router adds to a first token, and how many chunks it passes on, with workers that compute nothing."""
    with only_json(json):
        from pdspec.study import bench_router as study

        result = study.run(
            model=model or default_model(), streams=streams, chunks=chunks, prompt_tokens=prompt_tokens,
            requests=requests, runs=runs, progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


def mixed(
    model: Model = None,
    dtype: Dtype = None,
    threads: Threads = None,
    drafter: Annotated[str, typer.Option(help="Of every request.")] = "none",
    answers: Annotated[int, typer.Option(min=1, help="Long answers that decode meanwhile.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt that arrives.")] = 1536,
    rate: Annotated[float, typer.Option(help="Prompts a second.")] = 0.4,
    arrivals: Annotated[int, typer.Option(min=2, help="Prompts of one run.")] = 16,
    step_ms: Annotated[float, typer.Option(help="Shortest time of a token: makes the answers long enough.")] = 6.0,
    chunks: Annotated[str, typer.Option(help="Colocated chunk sizes, comma separated.")] = "16,32,64,128,256,512",
    runs: Annotated[int, typer.Option(min=1, help="In turns; the median counts.")] = 3,
    json: Json = False,
) -> None:
    """Inter-token latency while long prompts arrive: prefill and decode apart against one worker that does both."""
    with only_json(json):
        from pdspec.study import bench_mixed as study

        result = study.run(
            worker=given_flags(model=model, dtype=dtype, threads=threads), drafter=drafter, answers=answers,
            prompt_tokens=prompt_tokens, rate=rate, arrivals=arrivals, step_ms=step_ms,
            chunks=numbers(chunks, "chunks"), runs=runs, progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


@shared_options(num_prompts=16, max_tokens=64)
def step(
    settings: Annotated[
        str, typer.Option(help="DRAFTER or DRAFTER TREE beside none, semicolon separated.")
    ] = "ngram chain(2);eagle3 chain(2)",
    batch: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled answers.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Of the sampled answers.")] = 0.95,
    runs: Annotated[int, typer.Option(min=1, help="In turns; the median counts.")] = 3,
    *,
    shared: Shared,
) -> None:
    """Shares of a decode step: drafts, forward, Python, and noise with processors, in one process."""
    with only_json(shared.json):
        from pdspec.study import bench_step as study
        from pdspec.study.settings import Setting

        parts = [text.strip().partition(" ") for text in ("none", *settings.split(";")) if text.strip()]
        chosen = [Setting(drafter, tree.strip()) for drafter, _, tree in parts]
        result = study.run(
            worker=shared.worker, settings=chosen, batch=batch, temperature=temperature, top_p=top_p, **shared.asked(),
            runs=runs, progress=notes().print,
        )  # fmt: skip
    _finish(result, shared.json)


def short(
    model: Model = None,
    threads: Threads = None,
    only: Annotated[
        str, typer.Option(help="Sections, comma separated: decode, repetitive, step, router, mixed, stream, …")
    ] = "",
    peers: Annotated[
        str, typer.Option(help="Folder of virtual environments, or file of NAME: PYTHON.", envvar="PDSPEC_PEERS")
    ] = "",
    json: Json = False,
) -> None:
    """Every CPU figure in a short form beside what is promised of it, in less than ten minutes on a quiet machine."""
    with only_json(json):
        from pdspec.study import bench_short as study

        result = study.run(
            worker=given_flags(model=model, threads=threads), peers=peers,
            only=[name.strip() for name in only.split(",") if name.strip()], progress=notes().print,
        )  # fmt: skip
    if json:
        print_json(result)
    else:
        _print_table(result["rows"])
    if not result["ok"]:
        raise typer.Exit(1)


def _print_table(rows: list[dict[str, Any]]) -> None:
    found, floor = Column("found", justify="right"), Column("promised", justify="right")
    table = Table("section", "figure", found, floor, "", box=None)
    for row in rows:
        promised = f"{row['sense']} {row['floor']:.4g}" if row["sense"] else ""
        mark = "" if not row["sense"] else "ok" if row["ok"] else "MISSED"
        table.add_row(row["section"], row["figure"], f"{row['found']:.4g}", promised, mark)
    Console().print(table)


def _finish(result: dict[str, Any], json: bool) -> None:
    """Print it; exit status 1 where a floor is missed."""
    if json:
        print_json(result)
    else:
        for name, value in result.items():
            if name not in ("runs", "batch", "peers"):
                print(f"{name}: {value}")
    if not result["ok"]:
        raise typer.Exit(1)
