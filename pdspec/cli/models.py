"""``pdspec models``: the names that --model takes, and the same weights as files for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from pdspec.cli.options import Json, Model, default_model
from pdspec.cli.output import print_json


def models(context: typer.Context, json: Json = False) -> None:
    """List model aliases; any hub id or folder of a supported decoder works, too."""
    if context.invoked_subcommand:
        return
    from pdspec.model.config import SUPPORTED_ARCHITECTURES
    from pdspec.model.hub import ALIASES

    rows = [
        {
            "name": alias.name,
            "description": alias.description,
            "licence": alias.licence,
            "source": alias.wheel.requirement if alias.wheel else alias.hub_id or "generated",
            "default": alias.name == default_model(),
        }
        for alias in ALIASES.values()
    ]
    if json:
        print_json({"models": rows, "architectures": list(SUPPORTED_ARCHITECTURES)})
        return
    table = Table(Column("name", no_wrap=True), "what", "licence", "source", box=None, header_style="bold")
    for row in rows:
        mark = " (default)" if row["default"] else ""
        table.add_row(f"{row['name']}{mark}", str(row["description"]), str(row["licence"]), str(row["source"]))
    Console().print(table)
    Console().print(f"Also any hub id or folder of: {', '.join(SUPPORTED_ARCHITECTURES)}", highlight=False)


def export(
    out: Annotated[Path, typer.Option(help="GGUF file, or folder that does not exist yet.")],
    model: Model = None,
    json: Json = False,
) -> None:
    """Write the weights for other engines: NAME.gguf in bf16 for llama.cpp, else a Hugging Face folder."""
    from pdspec.model import gguf_export
    from pdspec.model.files import resolve

    files = resolve(model or default_model())
    written = gguf_export.export(files, out) if out.suffix == ".gguf" else gguf_export.export_folder(files, out)
    if json:
        print_json({"path": str(written), "content_hash": files.content_hash})
    else:
        print(written)
