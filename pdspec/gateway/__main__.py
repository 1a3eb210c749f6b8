"""``python -m pdspec.gateway --router host:port``: OpenAI's HTTP API in front of a router."""

from __future__ import annotations

import sys

from pdspec.config import HttpConfig
from pdspec.gateway.service import serving
from pdspec.wire.serving import serve_command


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status."""
    return serve_command(
        argv, HttpConfig, serving, role="http", module="pdspec.gateway", description="OpenAI's API over HTTP"
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
