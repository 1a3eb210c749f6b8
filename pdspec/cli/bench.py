"""``pdspec bench``: speed through the full path, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pdspec.cli.options import Dtype, HandoffPath, Heads, Json, Model, Numerics, Options, Prompts, Threads, given_flags
from pdspec.cli.output import notes, only_json, print_json
from pdspec.errors import InvalidRequest
from pdspec.settings import read_file


def decode(
    drafters: Annotated[
        str, typer.Option(help="Compared with each other, comma separated; all: every family.")
    ] = "none,ngram,eagle3",
    vs_transformers: Annotated[
        bool, typer.Option("--vs-transformers", help="Also transformers generate, in the same run.")
    ] = False,
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    handoff: HandoffPath = None,
    head: Heads = None,
    option: Options = None,
    threads: Threads = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from the file.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    nodes: Annotated[int, typer.Option(help="Draft nodes of one verification, for every drafter.")] = 8,
    runs: Annotated[int, typer.Option(help="Interleaved runs; the median counts.")] = 5,
    json: Json = False,
) -> None:
    """Tokens per second and acceptance length of drafters at an equal node budget, through router and workers."""
    worker = given_flags(model=model, dtype=dtype, numerics=numerics, heads=head, options=option, threads=threads)
    with only_json(json):
        from pdspec.study import bench_decode as study
        from pdspec.study.heads import families

        result = study.run(
            drafters=families(drafters),
            vs_transformers=vs_transformers,
            worker=worker,
            handoff=handoff or "direct",
            prompts=prompts, num_prompts=num_prompts, max_tokens=max_tokens, nodes=nodes, runs=runs,
            progress=notes().print,
        )  # fmt: skip
    _show(result, json)


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
            worker=given_flags(model=model, dtype=dtype, threads=threads), lengths=_numbers(lengths, "lengths"),
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


def _numbers(text: str, field: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InvalidRequest(f"{text!r} are no numbers", field=field, remedy="e.g. 512,2048")
    return [int(part) for part in parts]


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")


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
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    option: Options = None,
    threads: Threads = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from the file.")] = 24,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    json: Json = False,
) -> None:
    """The goodput budget against fixed trees: counted rows at one table of step times, at several concurrencies."""
    worker = given_flags(model=model, dtype=dtype, numerics=numerics, heads=head, options=option, threads=threads)
    with only_json(json):
        from pdspec.study import bench_budget as study

        result = study.run(
            worker=worker, drafter=drafter, trees=[text.strip() for text in trees.split(";") if text.strip()], cap=cap,
            concurrency=[int(text) for text in concurrency.split(",")], temperature=temperature, prompts=prompts,
            num_prompts=num_prompts, max_tokens=max_tokens, wall_pairs=wall, progress=notes().print,
            table=read_file(table)["table"] if table else None,
        )  # fmt: skip
    if json:
        print_json(result)
    else:
        for count, row in result["concurrency"].items():
            print(
                f"{count} at once: goodput {row['goodput']['tokens_per_second']:.1f} tokens/s,"
                f" {row['ratio_to_best']:.3f} of {row['best_fixed']}, {row['ratio_to_none']:.3f} of none"
            )
    if not result["ok"]:
        raise typer.Exit(1)
