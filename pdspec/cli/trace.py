"""``pdspec trace``: one answer, played back step by step in a page or live in the terminal."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pdspec.cli.options import Drafter, Dtype, Heads, Json, Model, Numerics, Threads, Tree, given_flags
from pdspec.cli.output import notes, only_json, print_json, spinner
from pdspec.errors import ConfigError


def trace(
    prompt: Annotated[str, typer.Argument(help="The user's message (default: two shipped scenarios).")] = "",
    html: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Show each verification in the terminal.")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 48,
    temperature: Annotated[float, typer.Option(help="0: greedy. Scenarios have their own.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Default: drawn.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    drafter: Drafter = None,
    tree: Tree = None,
    model: Model = None,
    dtype: Dtype = None,
    numerics: Numerics = None,
    head: Heads = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Replay of an answer: ghosts of drafts, checks and crosses, p and q, and the KV that is rewound."""
    if html is None and not live and not json:
        raise ConfigError("nowhere to show it", field="--html", remedy="give --html FILE, --live or --json")
    given = given_flags(model=model, drafter=drafter, dtype=dtype, numerics=numerics, heads=head, threads=threads)
    if drafter:
        given["drafters"] = tuple(dict.fromkeys(("none", drafter)))
    with only_json(json), spinner(notes(), "loading"):
        from pdspec.study.viewer.asking import Player, of_prompt, of_scenarios

        player = Player(given)
    seed = secrets.randbits(63) if seed is None else seed
    asked = of_prompt(prompt, raw=raw, temperature=temperature, seed=seed) if prompt else of_scenarios()
    out = Console(highlight=False, stderr=json)
    replays = []
    for one in asked:
        if live:
            out.print(f"[bold]{one.title}[/bold]")
        with only_json(json):
            replay = player.play(
                one, drafter=drafter or "", tree=tree or "", max_tokens=max_tokens, on_step=_shown(out, live)
            )
            replays.append(replay)
        if live:
            out.print(_summary(replays[-1]), style="dim")
    if html is not None:
        from pdspec.study.viewer.page import page

        try:
            html.write_text(page(replays), encoding="utf-8")
        except OSError as error:
            message = f"cannot write {html}: {error.strerror}"
            raise ConfigError(message, field="--html", remedy="name a file in a folder that exists") from error
        notes().print(f"wrote {html}; open it in any browser")
    if json:
        print_json({"replays": replays})


def _shown(out: Console, live: bool) -> Any:
    from pdspec.study.viewer.live import line

    count = 0

    def show(step: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if live:
            out.print(line(count, step), soft_wrap=True)

    return show


def _summary(replay: dict[str, Any]) -> str:
    share = replay["accepted"] / replay["drafted"] if replay["drafted"] else 0.0
    return (
        f"{replay['tokens']} tokens in {len(replay['steps'])} verifications, {replay['acceptance_length']:.2f} each, "
        f"{share:.0%} of {replay['drafted']} drafts accepted"
    )
