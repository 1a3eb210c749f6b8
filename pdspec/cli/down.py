"""``pdspec down``: end what ``pdspec up --detach`` left running."""

from __future__ import annotations

from typing import Annotated

import typer

from pdspec.cli import detached
from pdspec.cli.output import notes
from pdspec.errors import UnknownName


def down(
    endpoint: Annotated[str, typer.Option(help="End this one alone (default: every one).")] = "",
) -> None:
    """End the deployments that `pdspec up --detach` left running."""
    found = list(detached.running())
    chosen = [state for state in found if endpoint in ("", state.endpoint)]
    if endpoint and not chosen:
        remedy = "running: " + (", ".join(state.endpoint for state in found) or "none")
        raise UnknownName(f"no detached deployment at {endpoint}", field="endpoint", remedy=remedy)
    for state in chosen:
        detached.stop(state)
        notes().print(f"stopped {state.endpoint}")
    if not chosen:
        notes().print("nothing is running")
