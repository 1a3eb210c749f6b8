"""``python -m router --prefill host:port,… --decode host:port,…``: the router as a process, without Ray."""

from __future__ import annotations

import sys

from pdspec.config import RouterConfig
from pdspec.errors import ConfigError
from pdspec.telemetry import setup_logging
from pdspec.wire.serving import run_in_foreground
from router.service import serving


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status."""
    try:
        config = RouterConfig.from_args(argv, prog="python -m router", description="The token router")
    except ConfigError as error:
        print(f"router: {error}", file=sys.stderr)
        return 1
    setup_logging(config.log_level, name="router", log_format=config.log_format)
    return run_in_foreground(lambda: serving(config), "router")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
