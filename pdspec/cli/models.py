"""``pdspec models``: the names that --model takes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

from pdspec.cli.options import Json, default_model
from pdspec.cli.output import print_json


def models(json: Json = False) -> None:
    """List model aliases; any hub id or folder of a supported decoder works, too."""
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
