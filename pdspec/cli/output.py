"""What commands print: one JSON object on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from pdspec.telemetry import hardware, versions


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """While the block runs, whatever libraries print goes to stderr, so that stdout holds one object alone."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(values: Mapping[str, Any]) -> None:
    """Print ``values`` with ``hardware`` and ``versions`` as one line."""
    whole = {**values, "hardware": hardware(), "versions": versions()}
    print(json.dumps(whole, ensure_ascii=False, allow_nan=False), flush=True)


def notes() -> Console:
    """Where people read on: stderr."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def spinner(console: Console, text: str) -> Iterator[Any]:
    """``call(text)`` changes the line beside a spinner; without a terminal each text is a line of its own."""
    if not console.is_terminal:
        console.print(f"{text} …")
        yield lambda line: console.print(f"{line} …")
        return
    with console.status(f"{text} …") as status:
        yield lambda line: status.update(f"{line} …")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
