"""``pdspec study``: comparisons, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from pdspec.cli.options import Dtype, Json, Model, Options, Prompts, Threads, given_flags
from pdspec.cli.output import notes, only_json, print_json
from pdspec.cli.runs import Shared, shared_options
from pdspec.errors import ConfigError


@shared_options(num_prompts=16, max_tokens=64)
def acceptance(
    drafters: Annotated[
        str, typer.Option(help="Comma separated; all: every family (default: those that have a head or need none).")
    ] = "",
    tree: Annotated[
        list[str] | None, typer.Option("--tree", help="DRAFTER=TREE where it is not the default; may be repeated.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="Comma separated; 0: greedy.")] = "0,1",
    judged: Annotated[str, typer.Option(help="Family whose ways of verifying are compared; empty: none.")] = "eagle3",
    nodes: Annotated[int, typer.Option(min=1, help="Draft nodes of that comparison.")] = 4,
    *,
    shared: Shared,
) -> None:
    """Acceptance length and per position, draft and verify times of every family, behind the handoff and without."""
    with only_json(shared.json):
        from pdspec.study import acceptance as study
        from pdspec.study.heads import families

        result = study.run(
            worker=shared.worker,
            drafters=families(drafters) if drafters else (), trees=dict(_pair(text) for text in tree or []),
            temperatures=[float(text) for text in _names(temperatures)], judged=judged, nodes=nodes,
            **shared.asked(), progress=notes().print,
        )  # fmt: skip
    if shared.json:
        print_json(result)
        return
    for row in result["families"] + result.get("judged", {}).get("ways", []):
        _print_row(row, _SHOWN)


def comparison(name: str, summary: str, drafters: str) -> Callable[..., None]:
    """The command ``pdspec study <name>``; ``drafters`` are compared where none are named."""

    @shared_options(num_prompts=16, max_tokens=64)
    def command(
        drafters: Annotated[str, typer.Option(help="Comma separated.")] = drafters,
        temperatures: Annotated[str, typer.Option(help="Comma separated; 0: greedy.")] = "0,1",
        *,
        shared: Shared,
    ) -> None:
        with only_json(shared.json):
            from pdspec.study import comparisons as study

            result = study.run(
                name, worker=shared.worker,
                drafters=_names(drafters), temperatures=[float(text) for text in _names(temperatures)],
                **shared.asked(), progress=notes().print,
            )  # fmt: skip
        if shared.json:
            print_json(result)
            return
        for row in result["rows"]:
            _print_row(row, ("setting", *_SHOWN, "kv_bytes", "draft_kv_bytes", "hidden_bytes"))
        for order in result.get("orders", ()):
            print(*(f"{name} {value}" for name, value in order.items()))

    command.__doc__ = summary
    return command


COMPARISONS = {
    "stable-kv": ("Draft KV made anew from target hidden states, or kept as drafted.", "eagle1"),
    "first-token-padding": ("EAGLE's prefill with a row in front, or without.", "eagle1"),
    "draft-prefill": ("Draft KV crosses the handoff, or the hidden rows that it is made from.", "eagle3"),
    "trees": ("Chain, static and dynamic trees of equal nodes, ranked by survival or by q.", "eagle3"),
}


def stepping(name: str, summary: str, drafters: str) -> Callable[..., None]:
    """The command ``pdspec study <name>`` of a study of batches; ``drafters`` step where none are named."""

    @shared_options(num_prompts=16, max_tokens=64)
    def command(
        drafters: Annotated[str, typer.Option(help="Comma separated.")] = drafters,
        tree: Annotated[str, typer.Option(help="Of all of them (default: the study's, or each family's own).")] = "",
        temperatures: Annotated[str, typer.Option(help="Comma separated; 0: greedy.")] = "0,1",
        sequences: Annotated[int, typer.Option(min=1, help="Decoded together.")] = 4,
        *,
        shared: Shared,
    ) -> None:
        with only_json(shared.json):
            from pdspec.study import steps as study

            result = study.run(
                name, worker=shared.worker, drafters=_names(drafters), tree=tree,
                temperatures=[float(text) for text in _names(temperatures)], sequences=sequences,
                **shared.asked(), progress=notes().print,
            )  # fmt: skip
        if shared.json:
            print_json(result)
        else:
            for row in result["rows"]:
                _print_row(row, ("setting", *_SHOWN, "step_ms", "forwards_per_step", "bytes_read_per_token",
                                 "discarded_tokens", "kv_bytes", "draft_kv_bytes", "hidden_bytes"))
        if not result["ok"]:
            raise typer.Exit(1)

    command.__doc__ = summary
    return command


STEPPINGS = {
    "medusa-paths": ("A tree's paths verified one by one, one forward each, or the tree in one forward.", "medusa"),
    "min-sync": ("Each sequence of a batch keeps what it accepted, or all keep as many as the least.", "ngram,eagle3"),
}


@shared_options(num_prompts=8, max_tokens=64)
def wire_kv(
    drafters: Annotated[str, typer.Option(help="Comma separated.")] = "ngram,eagle3",
    temperatures: Annotated[str, typer.Option(help="Comma separated; 0: greedy.")] = "0,1",
    *,
    shared: Shared,
) -> None:
    """Target KV rounded to int8 on the wire (LOSSY) or whole: bytes, acceptance, agreement of answers and scores."""
    with only_json(shared.json):
        from pdspec.study import wire_kv as study

        result = study.run(
            worker=shared.worker, drafters=_names(drafters),
            temperatures=[float(text) for text in _names(temperatures)], **shared.asked(), progress=notes().print,
        )  # fmt: skip
    if shared.json:
        print_json(result)
    else:
        for row in result["rows"]:
            _print_row(row, ("wire_kv", "drafter", "temperature", "acceptance_length", "kv_bytes", "draft_kv_bytes",
                             "same_answers", "same_before_first_difference"))
        print(f"bytes of target KV: {result['bytes_ratio']:.3f} of whole ones;",
              *(f"{name} {value:.3g}" for name, value in result["scores"].items()))
    if not result["ok"]:
        raise typer.Exit(1)


def sparse(
    sequences: Annotated[int, typer.Option(min=1, help="Decoded together.")] = 8,
    context: Annotated[int, typer.Option(min=64, help="Prompt tokens of each.")] = 6000,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens written to each, in each round and way.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved; the median counts.")] = 3,
    trees: Annotated[str, typer.Option(help="Of the drafts, semicolon separated.")] = "chain(2);chain(3);chain(4)",
    model: Model = None,
    dtype: Dtype = None,
    option: Options = None,
    threads: Threads = None,
    prompts: Prompts = None,
    json: Json = False,
) -> None:
    """Long contexts in a batch: the target's drafts over a part of its own KV against plain decoding."""
    worker = given_flags(model=model, dtype=dtype, options=option, threads=threads)
    with only_json(json):
        from pdspec.study import sparse as study

        result = study.run(
            worker=worker,
            sequences=sequences, context=context, tokens=tokens, rounds=rounds,
            trees=[text.strip() for text in trees.split(";") if text.strip()], prompts=prompts,
            progress=notes().print,
        )  # fmt: skip
    if json:
        print_json(result)
    else:
        for row in result["rows"]:
            _print_row(row, ("drafter", "tree", "tokens_per_second", "acceptance_length", "speedup_over_none"))
    if not result["ok"]:
        raise typer.Exit(1)


_SHOWN = (
    "drafter", "tree", "verify", "temperature", "acceptance_length", "local_acceptance_length", "draft_ms",
    "verify_ms", "tokens_per_second",
)  # fmt: skip


def _print_row(row: dict[str, Any], shown: Sequence[str]) -> None:
    print(*(f"{row[name]}" if isinstance(row[name], str) else f"{name} {row[name]:.3g}" for name in shown))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"{text!r} is no DRAFTER=TREE", field="--tree", remedy="write --tree eagle3=chain(3)")
    return name.strip(), value.strip()
