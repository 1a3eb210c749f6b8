"""``pdspec train card``: figures added to a head's card."""

from __future__ import annotations

import json as jsonlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from pdspec.cli.options import Threads, default_model
from pdspec.errors import ConfigError


def card(
    head: Annotated[Path, typer.Argument(help="Folder of the head.")],
    family: Annotated[str, typer.Option(help="eagle3 | eagle1 | medusa | mtp | draft-model")] = "eagle3",
    model: Annotated[str | None, typer.Option(help="The target; see `pdspec models`.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts never trained on, to measure acceptance on.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Of them, spread over the file.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 160,
    temperatures: Annotated[str, typer.Option(help="Of the answers, comma separated.")] = "0,1",
    served: Annotated[
        list[Path] | None, typer.Option(help="What `pdspec study acceptance --json` printed; may be repeated.")
    ] = None,
    served_command: Annotated[
        list[str] | None, typer.Option(help="The command that printed it; may be repeated.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Measure a head on prompts never trained on, take in served figures, and write its card anew."""
    from pdspec.train.card import add_to_card, served_rows, write_card
    from pdspec.train.evaluate import evaluate_on

    name = family.replace("-", "_")
    if prompts:
        target = model or default_model()
        for temperature in (float(text) for text in temperatures.split(",")):
            found = evaluate_on(
                head, prompts, family=name, model=target, num_prompts=num_prompts, max_tokens=max_tokens,
                temperature=temperature, threads=threads or 0,
            )  # fmt: skip
            command = (f"pdspec train card {shlex.quote(str(head))} --family {family} --model {target} --prompts "
                       f"{shlex.quote(prompts.name)} --num-prompts {num_prompts} --max-tokens {max_tokens} "
                       f"--temperatures {temperatures}")  # fmt: skip
            label = f"{prompts.stem}, T = {temperature:g}"
            add_to_card(head, evaluations={label: {**found.as_dict(), "command": command}})
    if served:
        rows = []
        for path in served:
            try:
                rows += served_rows(jsonlib.loads(path.read_text(encoding="utf-8")), name)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"cannot read {path}: {error!r}", field="--served",
                                  remedy="give what pdspec study acceptance --json printed") from error
        add_to_card(head, served=rows, **({"served_commands": served_command} if served_command else {}))
    print(write_card(head))
