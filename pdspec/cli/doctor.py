"""``pdspec doctor``: is this machine fit to serve, and is a deployment well? Exit status 1 when something fails."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from pdspec.cli.options import Json, TlsCa, TlsCert, TlsKey, TokenFlag, access
from pdspec.cli.output import only_json, print_json


def doctor(
    endpoint: Annotated[
        str, typer.Option(help="A router's host:port: its workers are looked at, too.", envvar="PDSPEC_ENDPOINT")
    ] = "",
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    token_file: TokenFlag = "",
    json: Json = False,
) -> None:
    """Versions, compiler, memory, cache, Ray's token and ports; with --endpoint workers, fingerprints and clocks."""
    with only_json(json):
        from pdspec.study import doctor as study

        shown = access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
        report = study.run(endpoint=endpoint, access=shown)
    if json:
        print_json(report)
    else:
        console = Console(highlight=False)
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for found in report["findings"]:
            remedy = f"  → {found['remedy']}" if found["remedy"] and found["state"] != "ok" else ""
            console.print(f"[{colours[found['state']]}]{found['state']:4}[/] {found['name']}: {found['found']}{remedy}")
    if not report["ok"]:
        raise typer.Exit(1)
