"""``pdspec http``: OpenAI's HTTP API in front of a router that runs already."""

from __future__ import annotations

from typing import Annotated

import typer

from pdspec.cli.options import DEFAULT_ENDPOINT, Endpoint, TlsCa, TlsCert, TlsKey
from pdspec.config import HttpConfig, TlsConfig
from pdspec.telemetry import setup_logging


def http(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    cert: Annotated[str, typer.Option(help="Certificate chain of HTTPS (PEM); without one it is HTTP.")] = "",
    key: Annotated[str, typer.Option(help="The key of --cert.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Of chats that name none.")] = HttpConfig().max_tokens,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics; -1: none.")] = -1,
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
) -> None:
    """Serve OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models) over a running deployment's router."""
    config = HttpConfig(
        host=host, port=max(port, 0), router=endpoint, cert=cert, key=key, max_tokens=max_tokens,
        metrics_port=metrics_port, tls=TlsConfig(ca=tls_ca, cert=tls_cert, key=tls_key),
    )  # fmt: skip
    setup_logging(config.log_level, name="http", log_format=config.log_format)
    from pdspec.gateway.service import serving
    from pdspec.wire.serving import run_in_foreground

    raise typer.Exit(run_in_foreground(lambda: serving(config), "http"))
