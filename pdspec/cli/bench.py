"""``pdspec bench``: speed through the full path, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pdspec.cli.options import Dtype, HandoffPath, Json, Model, Threads, given_flags, numbers
from pdspec.cli.output import notes, only_json, print_json
from pdspec.cli.runs import Shared, shared_options
from pdspec.settings import read_file


@shared_options(num_prompts=8, max_tokens=128)
def decode(
    drafters: Annotated[
        str, typer.Option(help="Compared with each other, comma separated; all: every family.")
    ] = "none,ngram,eagle3",
    vs_transformers: Annotated[
        bool, typer.Option("--vs-transformers", help="Also transformers generate, in the same run.")
    ] = False,
    handoff: HandoffPath = None,
    nodes: Annotated[int, typer.Option(help="Draft nodes of one verification, for every drafter.")] = 8,
    runs: Annotated[int, typer.Option(help="Interleaved runs; the median counts.")] = 5,
    temperature: Annotated[float, typer.Option(min=0.0, help="Also sampled, beside greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of the sampled answers.")] = 0.95,
    *,
    shared: Shared,
) -> None:
    """Tokens per second and acceptance length of drafters at an equal node budget, through router and workers."""
    with only_json(shared.json):
        from pdspec.study import bench_decode as study
        from pdspec.study.bench_short import REPETITIVE_SPEEDUP
        from pdspec.study.heads import families
        from pdspec.study.workloads import REPETITIVE

        result = study.run(
            drafters=families(drafters),
            vs_transformers=vs_transformers,
            worker=shared.worker,
            handoff=handoff or "direct",
            **shared.asked(), nodes=nodes, runs=runs, temperature=temperature, top_p=top_p,
            wanted_speedup=REPETITIVE_SPEEDUP if shared.workload == REPETITIVE else 0.0,
            progress=notes().print,
        )  # fmt: skip
    _show(result, shared.json)
    if not result["ok"]:
        raise typer.Exit(1)


def stream(
    model: Model = None,
    dtype: Dtype = None,
    tokens: Annotated[int, typer.Option(help="Prompt tokens of a handoff.")] = 2048,
    megabytes: Annotated[int, typer.Option(help="Of one raw stream.")] = 512,
    runs: Annotated[int, typer.Option(help="Runs in turns; the median counts.")] = 5,
    json: Json = False,
) -> None:
    """Bytes per second of KV over gRPC, through a relay and through shared memory, and the CPU time of a handoff."""
    with only_json(json):
        from pdspec.study import bench_stream as study

        worker = given_flags(model=model, dtype=dtype)
        result = study.run(worker=worker, tokens=tokens, megabytes=megabytes, runs=runs, progress=notes().print)
    _show(result, json)


def handoff(
    model: Model = None,
    dtype: Dtype = None,
    threads: Threads = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths, comma separated.")] = "512,1024,2048,4096,8192",
    runs: Annotated[int, typer.Option(help="Runs in turns; the median counts.")] = 5,
    json: Json = False,
) -> None:
    """Exposed time of a handoff over every path, on a slow link too, its CPU time, and decode steps while it lands."""
    with only_json(json):
        from pdspec.study import bench_handoff as study

        result = study.run(
            worker=given_flags(model=model, dtype=dtype, threads=threads), lengths=numbers(lengths, "lengths"),
            runs=runs, progress=notes().print,
        )  # fmt: skip
    _show(result, json)


def prefix(
    model: Model = None,
    dtype: Dtype = None,
    threads: Threads = None,
    drafter: Annotated[str | None, typer.Option(help="Whose draft KV is cached, too.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens of the first turn.")] = 1024,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the user adds for the second turn.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Samples of one prompt asked for at once.")] = 4,
    runs: Annotated[int, typer.Option(min=1, help="Conversations, in turns; the median counts.")] = 5,
    json: Json = False,
) -> None:
    """Time to the first token and bytes moved, with and without prefix caches: a chat's second turn, and samples."""
    with only_json(json):
        from pdspec.study import bench_prefix as study

        result = study.run(
            worker=given_flags(model=model, dtype=dtype, threads=threads, drafter=drafter), tokens=tokens,
            answer_tokens=answer_tokens, new_tokens=new_tokens, samples=samples, runs=runs, progress=notes().print,
        )  # fmt: skip
    _show(result, json)
    if not result["same_answers"]:
        raise typer.Exit(1)


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")


@shared_options(num_prompts=24, max_tokens=64)
def budget(
    drafter: Annotated[str, typer.Option(help="Whose drafts are budgeted.")] = "eagle3",
    trees: Annotated[
        str, typer.Option(help="Fixed settings beside none, semicolon separated.")
    ] = "chain(1);chain(2);chain(3);dynamic(3,3,6);dynamic(4,4,8)",
    cap: Annotated[str, typer.Option(help="The most that goodput may draft.")] = "dynamic(4,4,8)",
    concurrency: Annotated[str, typer.Option(help="Answers written at once, comma separated.")] = "1,4,8,16",
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    table: Annotated[
        Path | None, typer.Option(help="JSON report of an earlier run: its step times instead of new ones.")
    ] = None,
    wall: Annotated[int, typer.Option(min=0, help="Also so many interleaved pairs by the clock.")] = 0,
    *,
    shared: Shared,
) -> None:
    """The goodput budget against fixed trees: counted rows at one table of step times, at several concurrencies."""
    with only_json(shared.json):
        from pdspec.study import bench_budget as study

        result = study.run(
            worker=shared.worker, drafter=drafter, cap=cap,
            trees=[text.strip() for text in trees.split(";") if text.strip()],
            concurrency=numbers(concurrency, "concurrency"), temperature=temperature, **shared.asked(),
            wall_pairs=wall, progress=notes().print, table=read_file(table)["table"] if table else None,
        )  # fmt: skip
    if shared.json:
        print_json(result)
    else:
        for count, row in result["concurrency"].items():
            print(f"{count} at once: goodput {row['goodput']['tokens_per_second']:.1f} tokens/s,"
                  f" {row['ratio_to_best']:.3f} of {row['best_fixed']}, {row['ratio_to_none']:.3f} of none")
    if not result["ok"]:
        raise typer.Exit(1)
