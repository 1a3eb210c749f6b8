"""``pdspec generate``: one prompt, streamed to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from pdspec.cli.options import (
    DEFAULT_ENDPOINT,
    Drafter,
    DraftPrefillRole,
    Dtype,
    Endpoint,
    HandoffPath,
    Heads,
    Json,
    Model,
    Numerics,
    Plugins,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFlag,
    Tree,
    access,
    given_flags,
)
from pdspec.cli.output import notes, only_json, print_json, size, spinner
from pdspec.client import Answer, Piece, RouterClient, collect
from pdspec.config import WorkerConfig
from pdspec.errors import InvalidRequest
from pdspec.types import SamplingParams, UserRequest


def generate(
    prompt: Annotated[str, typer.Argument(help="The user's message; - reads it from stdin.")],
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0: off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Default: drawn, and returned.")] = None,
    verify: Annotated[str, typer.Option(help="coupled, rejection, block or greedy.")] = "coupled",
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end token.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    drafter: Drafter = None,
    tree: Tree = None,
    handoff: HandoffPath = None,
    draft_prefill: DraftPrefillRole = None,
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    token_file: TokenFlag = "",
    json: Json = False,
    local: Annotated[bool, typer.Option("--local", help="In this process, without router and workers.")] = False,
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    plugin: Plugins = None,
    threads: Threads = None,
) -> None:
    """Answer one prompt through a running deployment, or with --local in this process."""
    text = sys.stdin.read() if prompt == "-" else prompt
    turns = (("system", system),) if system is not None else ()
    request = UserRequest(
        text=text if raw else None,
        chat=None if raw else (*turns, ("user", text)),
        sampling=SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens,
            stop_strings=tuple(stop or ()), ignore_eos=ignore_eos, verify=verify,
        ),
        model="" if local else model or "",
        drafter=drafter or "",
        tree=tree or "",
        handoff=handoff or "",
        draft_prefill=draft_prefill or "",
    )  # fmt: skip
    if not local:
        of_workers = {"--dtype": dtype, "--numerics": numerics, "--head": head or None, "--plugin": plugin or None,
                      "--threads": threads}  # fmt: skip
        for flag, value in of_workers.items():
            if value is not None:
                raise InvalidRequest("chosen when a deployment starts", field=flag, remedy="use it with --local or up")
        shown = access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
        with RouterClient(endpoint, shown) as client:
            _answer(client.stream(request), json=json)
        return
    given = given_flags(model=model, drafter=drafter, dtype=dtype, numerics=numerics, heads=head, threads=threads,
                        plugins=plugin)  # fmt: skip
    if drafter:
        given["drafters"] = (drafter,)
    with only_json(json), spinner(notes(), "loading"):
        from pdspec.cli.local import LocalModel

        loaded = LocalModel(WorkerConfig.from_mapping(given))
    _answer(loaded.stream(request), json=json)


def _answer(pieces: Iterator[Piece], *, json: bool) -> None:
    if json:
        with only_json(True):
            answer = collect(pieces)
        print_json(answer.to_json())
        return
    answer = collect(pieces, lambda text: print(text, end="", flush=True))
    print(flush=True)
    notes().print(summary(answer), style="dim", soft_wrap=True)


def summary(answer: Answer) -> str:
    """One line about an answer."""
    stats = answer.stats
    parts = [
        f"{len(answer.token_ids)} tokens ({answer.finish_reason})",
        f"TTFT {answer.ttft_ms:.0f} ms",
        f"{answer.tpot_ms:.1f} ms per token",
        f"{stats.acceptance_length:.2f} tokens per verification",
    ]
    if stats.prefill_worker:
        moved = f"KV {size(stats.kv_bytes)} + draft {size(stats.draft_kv_bytes)}"
        parts.append(f"{stats.prefill_worker} → {stats.decode_worker}, {moved}")
    return " · ".join([*parts, f"seed {answer.seed}"])
