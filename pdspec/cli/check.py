"""``pdspec check``: the proofs, run on this machine. Exit status 1 when one fails."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from pdspec.cli.options import Dtype, Heads, Json, Model, Numerics, Options, Plugins, Prompts, Threads, given_flags
from pdspec.cli.output import notes, only_json, print_json


def parity(
    drafters: Annotated[str, typer.Option(help="Comma separated; all: every family.")] = "none,ngram,suffix,eagle3",
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    option: Options = None,
    plugin: Plugins = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from the file.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    transformers: Annotated[bool, typer.Option(help="Audit greedy answers against transformers, too.")] = True,
    json: Json = False,
) -> None:
    """Every drafter, tree and handoff against `--local --drafter none`: token for token, or audited in fast mode."""
    with only_json(json):
        from pdspec.study import parity as study
        from pdspec.study.heads import families

        result = study.run(
            worker=given_flags(model=model, dtype=dtype, numerics=numerics, heads=head, options=option,
                               plugins=plugin),
            drafters=families(drafters, plugin or ()), prompts=prompts, num_prompts=num_prompts, max_tokens=max_tokens,
            transformers=transformers, progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


def handoff(
    drafters: Annotated[str, typer.Option(help="Comma separated; all: every family.")] = "eagle3",
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    option: Options = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts taken from the file.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    parts: Annotated[
        str, typer.Option(help="Some of proposals,draft_state,controls,acceptance (default: all, or those of --dtype).")
    ] = "",
    acceptance_tokens: Annotated[
        int, typer.Option(min=1, help="Least output tokens of the part acceptance; prompts are asked again until then.")
    ] = 20_000,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Drafts behind the handoff against one process; draft state against the paper; broken handoffs must be seen."""
    with only_json(json):
        from pdspec.study import handoff_check as study
        from pdspec.study.heads import families

        result = study.run(
            worker=given_flags(
                model=model, dtype=dtype, numerics=numerics, heads=head, options=option, threads=threads
            ),
            asked=study.Asked(
                prompts=prompts, num_prompts=num_prompts, max_tokens=max_tokens, tokens=acceptance_tokens
            ),
            parts=[part.strip() for part in parts.split(",") if part.strip()],
            drafters=[name for name in families(drafters) if name != "none"], progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


def lossless(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, on the tiny model: 2 minutes.")] = False,
    drafters: Annotated[str, typer.Option(help="Comma separated; all: every family.")] = "all",
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    option: Options = None,
    plugin: Plugins = None,
    prompts: Prompts = None,
    parts: Annotated[str, typer.Option(help="Some of law,paths,joint,answers (default: all).")] = "",
    seeds: Annotated[int, typer.Option(help="Of the drafts that mean harm (default: 100000; quick: 1500).")] = 0,
    joint_seeds: Annotated[int, typer.Option(help="Samples of two tokens of the model (default: 4000; quick: 0).")] = 0,
    num_prompts: Annotated[int, typer.Option(help="Prompts of part answers (default: 20; quick: 2).")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer (default: 128; quick: 16).")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """No drafter, tree or verification changes the output: exact laws, equal paths, sampled pairs, whole answers."""
    with only_json(json):
        from pdspec.study import lossless as study
        from pdspec.study.heads import families

        asked: dict[str, Any] = {"harmful_seeds": seeds, "joint_seeds": joint_seeds, "num_prompts": num_prompts,
                 "max_tokens": max_tokens}  # fmt: skip
        sizes = dataclasses.replace(study.QUICK if quick else study.Sizes(), **{k: v for k, v in asked.items() if v})
        worker = given_flags(model=model or ("tiny" if quick else None), dtype=dtype, numerics=numerics, heads=head,
                        options=option, plugins=plugin, threads=threads)  # fmt: skip
        result = study.run(
            worker=worker, sizes=sizes, parts=[part.strip() for part in parts.split(",") if part.strip()],
            drafters=families(drafters, plugin or ()), prompts=prompts, progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


def structured(
    drafters: Annotated[str, typer.Option(help="Comma separated; all: every family.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="On the tiny model.")] = False,
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    option: Options = None,
    plugin: Plugins = None,
    parts: Annotated[str, typer.Option(help="Some of families,ratio,replay,handoff (default: all).")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Sampled answers to each question.")] = 2,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answers keep to a JSON schema, regular expression or choice, with the plain run's tokens whatever the drafter."""
    with only_json(json):
        from pdspec.study import structured as study
        from pdspec.study.heads import families

        worker = given_flags(model=model or ("tiny" if quick else None), dtype=dtype, numerics=numerics, heads=head,
                        options=option, plugins=plugin, threads=threads)  # fmt: skip
        result = study.run(
            worker=worker, drafters=families(drafters, plugin or ()), seeds=seeds, progress=notes().print,
            parts=[part.strip() for part in parts.split(",") if part.strip()],
        )  # fmt: skip
    _finish(result, json)


def tp(
    drafters: Annotated[str, typer.Option(help="Comma separated.")] = "none,ngram,eagle3",
    degrees: Annotated[str, typer.Option(help="PREFILL:DECODE ranks of the workers, comma separated.")] = "2:1",
    model: Model = None,
    dtype: Annotated[str | None, typer.Option(help="float32 | bfloat16 (default: float32)")] = None,
    head: Heads = None,
    option: Options = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts taken from the file.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 24,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Workers of several ranks against one process, on tiny and SmolLM2: audited tokens, the same acceptance."""
    with only_json(json):
        from pdspec.study import tp as study
        from pdspec.study.heads import families

        result = study.run(
            worker=given_flags(model=model, dtype=dtype, heads=head, options=option, threads=threads),
            degrees=study.parse_degrees(degrees), drafters=families(drafters), prompts=prompts,
            num_prompts=num_prompts, max_tokens=max_tokens, progress=notes().print,
        )  # fmt: skip
    _finish(result, json)


def drafter(
    name: Annotated[str, typer.Argument(help="A drafter of `pdspec drafters`, or of --plugin.")],
    model: Model = "tiny",
    dtype: Dtype = None,
    head: Heads = None,
    option: Options = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """What every drafter promises to the engines: trees within budget, state in its place, rows as declared."""
    with only_json(json):
        from pdspec.study import drafter_contract as study

        worker = given_flags(model=model, heads=head, options=option, plugins=plugin)
        result = study.run(name, worker=worker, dtypes=(dtype,) if dtype else study.DTYPES)
    _finish(result, json)


def _finish(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    if not result["ok"]:
        raise typer.Exit(1)


def plan(
    parts: Annotated[str, typer.Option(help="Some of textbook,drafters,real,scale (default: all).")] = "",
    drafters: Annotated[str, typer.Option(help="Comma separated (default: those that have a head or need none).")] = "",
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    option: Options = None,
    threads: Threads = None,
    prompts: Prompts = None,
    num_prompts: Annotated[int, typer.Option(min=2, help="Half calibrate, half are predicted.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 96,
    requests: Annotated[int, typer.Option(min=4, help="Of each real run.")] = 100,
    load: Annotated[float, typer.Option(min=0.05, help="Share of what one pair could serve.")] = 0.6,
    json: Json = False,
) -> None:
    """Predictions against the textbook, other prompts, real runs of 1P1D and 2P2D, and an hour on 1,000 workers."""
    with only_json(json):
        from pdspec.study.heads import families
        from pdspec.study.plan import check as study

        result = study.run(
            worker=given_flags(
                model=model, dtype=dtype, numerics=numerics, heads=head, options=option, threads=threads
            ),
            parts=[part.strip() for part in parts.split(",") if part.strip()],
            drafters=families(drafters) if drafters else (), prompts=prompts, num_prompts=num_prompts,
            max_tokens=max_tokens, requests=requests, load=load, progress=notes().print,
        )  # fmt: skip
    _finish(result, json)
