"""``pdspec bench``: speed through the full path, measured on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pdspec.cli.options import Dtype, HandoffPath, Heads, Json, Model, Numerics, Options, Prompts, Threads, given_flags
from pdspec.cli.output import notes, only_json, print_json


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
    if json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")
