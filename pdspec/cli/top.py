"""``pdspec top``: the workers and requests of a running deployment, as a live table."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdspec.cli.options import DEFAULT_ENDPOINT, Endpoint, Json, TlsCa, TlsCert, TlsKey, TokenFlag, access
from pdspec.cli.output import only_json, print_json
from pdspec.client import RouterClient
from pdspec.errors import InvalidRequest

Rows = list[dict[str, Any]]


def top(
    endpoint: Endpoint = DEFAULT_ENDPOINT,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, print, and end.")] = False,
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    token_file: TokenFlag = "",
    json: Json = False,
) -> None:
    """Workers (state, load, KV, tokens per second, acceptance) and requests under way; ends with Ctrl-C."""
    if json and not once:
        raise InvalidRequest("a live table is no object", field="--json", remedy="add --once")
    shown = access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    with RouterClient(endpoint, shown) as client:
        looks = Looks(client)
        if once:
            with only_json(json):
                looks.look()
                time.sleep(interval)
                workers, requests = looks.look()
            if json:
                print_json({"endpoint": endpoint, "workers": workers, "requests": requests})
            else:
                Console().print(table(endpoint, workers, requests))
            return
        try:
            with Live(Text("…"), screen=False, auto_refresh=False) as live:
                while True:
                    live.update(table(endpoint, *looks.look()), refresh=True)
                    time.sleep(interval)
        except KeyboardInterrupt:
            return


class Looks:
    """Asks the router; rates are those between two looks."""

    def __init__(self, client: RouterClient) -> None:
        self._client = client
        self._before: dict[str, dict[str, float]] = {}
        self._at = 0.0

    def look(self) -> tuple[Rows, Rows]:
        """(workers, requests)."""
        found, requests, now = self._client.workers(), self._client.requests(), time.monotonic()
        elapsed, rows = now - self._at, []
        for worker in found:
            counts = {name: worker["metrics"].get(name, 0.0) for name in ("generation_tokens", "verifications")}
            before = self._before.get(worker["address"])
            rows.append({**_row(worker), **_rates(counts, before, elapsed)})
            self._before[worker["address"]] = counts
        self._at = now
        return rows, requests


def _row(worker: dict[str, Any]) -> dict[str, Any]:
    held, total = worker["total_pages"] - worker["free_pages"], worker["total_pages"]
    kept = ("worker_id", "role", "address", "state", "reason", "running", "queued", "pending", "steps")
    return {
        **{name: worker[name] for name in kept}, "kv_cache_usage": round(held / total, 4) if total else 0.0,
        "wire_kv_lossy": bool(worker["metrics"].get("wire_kv_lossy")),
    }  # fmt: skip


def _rates(counts: dict[str, float], before: dict[str, float] | None, elapsed: float) -> dict[str, float]:
    """Output tokens per second, and per verification; both 0 while nothing happens."""
    gone = {name: max(0.0, value - before[name]) for name, value in counts.items()} if before else counts
    tokens, verifications = gone["generation_tokens"], gone["verifications"]
    rate = tokens / elapsed if before and elapsed > 0 else 0.0
    return {
        "tokens_per_s": round(rate, 2),
        "acceptance_length": round(tokens / verifications, 3) if verifications else 0.0,
    }


def table(endpoint: str, workers: Rows, requests: Rows) -> Group:
    """Both tables."""
    named = Table("worker", "role", "state", "running", "queued", "KV", "tokens/s", "per verification", box=None)
    for column in named.columns[3:]:
        column.justify = "right"
    colours = {"ready": "green", "draining": "yellow", "unknown": "yellow"}
    for row in workers:
        state = Text(f"{row['state']} {row['reason']}".strip(), style=colours.get(row["state"], "red"))
        cells = (str(row["running"]), str(row["queued"]), f"{row['kv_cache_usage']:.0%}", f"{row['tokens_per_s']:.1f}")
        length = f"{row['acceptance_length']:.2f}" if row["acceptance_length"] else "–"
        role = f"{row['role']}, LOSSY wire KV" if row["wire_kv_lossy"] else row["role"]
        named.add_row(row["worker_id"] or row["address"], role, state, *cells, length)
    under_way = Table("request", "drafter", "prompt", "output", "of", "age", box=None)
    for column in under_way.columns[2:]:
        column.justify = "right"
    for entry in requests[:20]:
        under_way.add_row(entry["request_id"], entry["drafter"] or "–", str(entry["prompt_tokens"]),
                          str(entry["output_tokens"]), str(entry["max_tokens"]), f"{entry['age_s']:.1f} s")  # fmt: skip
    more = f" (20 of {len(requests)})" if len(requests) > 20 else ""
    return Group(Text(f"router {endpoint}", style="bold"), named, Text(f"\n{len(requests)} requests{more}"), under_way)
