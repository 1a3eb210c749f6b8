"""``python -m pdspec.gateway --router host:port``: OpenAI's HTTP API in front of a router."""

from __future__ import annotations

import sys

from pdspec.config import HttpConfig
from pdspec.errors import ConfigError
from pdspec.gateway.service import serving
from pdspec.telemetry import setup_logging
from pdspec.wire.serving import run_in_foreground


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status."""
    try:
        config = HttpConfig.from_args(argv, prog="python -m pdspec.gateway", description="OpenAI's API over HTTP")
    except ConfigError as error:
        print(f"http: {error}", file=sys.stderr)
        return 1
    setup_logging(config.log_level, name="http", log_format=config.log_format)
    return run_in_foreground(lambda: serving(config), "http")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
