"""``python -m router --prefill host:port,… --decode host:port,…``: the router as a process, without Ray."""

from __future__ import annotations

import sys

from pdspec.config import RouterConfig
from pdspec.wire.serving import serve_command
from router.service import serving


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status."""
    return serve_command(
        argv, RouterConfig, serving, role="router", module="router", description="The token router"
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
