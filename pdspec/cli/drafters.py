"""``pdspec drafters``: what --drafter takes, and what each one needs."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pdspec.cli.options import Json, Plugins
from pdspec.cli.output import print_json


def drafters(plugin: Plugins = None, json: Json = False) -> None:
    """List the drafters with what each one needs."""
    from pdspec.spec.registry import describe

    rows = describe(plugin or ())
    if json:
        print_json({"drafters": rows})
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, box=None, header_style="bold")
    for row in rows:
        table.add_row(*(_plain(row.get(name, "")) for name in names))
    Console().print(table)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
