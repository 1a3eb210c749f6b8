"""``pdspec study report``: one page that loads nothing, and the same as Markdown with PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pdspec.errors import ConfigError
from pdspec.study.cells.figures import Picture, pictures
from pdspec.study.cells.store import described
from pdspec.study.cells.tables import read

Row = Mapping[str, Any]
_HEAD = (
    "cell", "pd", "handoff", "drafter", "tree", "load", "tokens/s", "TTFT P50", "P90", "P99", "per token P50", "P90",
    "P99", "between messages P50", "P90", "P99", "tokens per verification", "not repeated", "repeated 8-grams",
    "good requests", "good tokens/s", "per million tokens", "drafting", "verifying", "other", "decode workers busy",
    "joules per token", "TTFT of turn 1 P50", "TTFT of later turns P50", "prompt cached", "cached of later turns",
)  # fmt: skip
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
figure { margin: 2.5rem 0; } figure svg { width: 100%; height: auto; } h2 { margin: 0 0 .3rem; font-size: 1.15rem; }
.from { color: #666; font-size: 12px; overflow-wrap: anywhere; } code { font-size: 12px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 12px; white-space: nowrap; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #ddd; text-align: right; }
th:nth-child(-n+6), td:nth-child(-n+6) { text-align: left; } th { white-space: normal; vertical-align: bottom; }
"""


def report(folder: str | Path) -> dict[str, Any]:
    """Write report.html, report.md and figures/*.png into ``folder``; what is in them, and the names of the files.
    Raises ConfigError where no study is, its tables are missing, or matplotlib is."""
    folder = Path(folder)
    about, cells, requests = described(folder), read(folder / "cells.parquet"), read(folder / "requests.parquet")
    drawn = pictures(cells, requests)
    texts = {"report.html": html(about, cells, drawn), "report.md": markdown(about, cells, drawn)}
    try:
        (folder / "figures").mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for one in drawn:
            (folder / "figures" / f"{one.name}.png").write_bytes(one.png)
    except OSError as error:
        message = f"cannot write into {folder}: {error.strerror}"
        raise ConfigError(message, field="DIR", remedy="name a folder that can be written") from error
    made = [
        {"name": one.name, "table": one.table, "columns": list(one.columns), "cells": list(one.cells)} for one in drawn
    ]
    return {"html": str(folder / "report.html"), "markdown": str(folder / "report.md"), "figures": made}


def html(about: Row, cells: Sequence[Row], drawn: Sequence[Picture]) -> str:
    """The page: nothing in it comes from elsewhere."""
    name = escape(about["study"]["name"])
    said = "".join(f"<p>{escape(line)}</p>\n" for line in sentences(about, cells))
    shown = "".join(
        f'<figure id="{one.name}"><h2>{escape(one.title)}</h2>\n{one.svg}\n<figcaption>{escape(one.caption)}'
        f'<p class="from">{escape(source(one))}</p></figcaption></figure>\n'
        for one in drawn
    )
    head = "".join(f"<th>{escape(text)}</th>" for text in _HEAD)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in values(row)) + "</tr>\n" for row in cells
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{name}</h1>\n{said}{shown}"
        f'<h2>Cells</h2><div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
        f'<p class="from">{escape(_NOTE)}</p></body></html>\n'
    )


_NOTE = (
    "Times in milliseconds. A percentile that has too few samples is not shown: P99 needs 100. Per token: the mean of "
    "an answer after its first token. Between messages: a message brings the tokens of one verification. Drafting, "
    "verifying (the target's forward) and other are shares of the decode steps' time, busy is their share of the "
    "cell's. Joules are those of the whole machine, whatever else runs on it. All rows are in requests.parquet, all "
    "figures of the table in cells.parquet."
)


def markdown(about: Row, cells: Sequence[Row], drawn: Sequence[Picture]) -> str:
    """The same for where pages are not shown."""
    parts = [f"# {about['study']['name']}", *sentences(about, cells)]
    for one in drawn:
        parts += [f"## {one.title}", f"![{one.title}](figures/{one.name}.png)", one.caption, f"*{source(one)}*"]
    rows = [_HEAD, tuple("---" for _ in _HEAD), *map(values, cells)]
    parts += ["## Cells", "\n".join("| " + " | ".join(row) + " |" for row in rows), _NOTE]
    return "\n\n".join(parts) + "\n"


def source(one: Picture) -> str:
    """Where a picture comes from."""
    return f"Made from {one.table}, columns {', '.join(one.columns)}; cells {', '.join(one.cells)}."


def sentences(about: Row, cells: Sequence[Row]) -> list[str]:
    """What was measured on what, and what came out first."""
    machine, goal = about["hardware"], about["study"]["slo"]
    known = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    found = [
        f"{len(cells)} of {len(about['cells'])} cells, {sum(row['rows'] for row in cells)} requests,"
        f" {sum(row['output_tokens'] for row in cells)} output tokens.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {known}.",
        f"A good request has its first token within {goal['ttft_ms']:g} ms and each other within {goal['tpot_ms']:g} ms"
        " on average.",
    ]
    if len(about["runs"]) > 1:
        found.append(f"Cells come from {len(about['runs'])} machines or sets of versions (runs in study.json).")
    for load in dict.fromkeys(row["load"] for row in cells):
        own = [row for row in cells if row["load"] == load and row["decode"]]
        best = [
            max(some, key=lambda row: row["tokens_per_second"])
            for apart in (False, True)
            if (some := [row for row in own if (row["prefill"] > 0) == apart])
        ]
        if len(best) == 2 and best[0]["tokens_per_second"]:
            ratio = best[1]["tokens_per_second"] / best[0]["tokens_per_second"]
            names = [f"{row['pd']} {row['drafter']} {row['tokens_per_second']:.1f} tokens/s" for row in best]
            found.append(f"{load}: best colocated {names[0]}, best disaggregated {names[1]} ({ratio:.2f}x).")
    return found


def values(row: Row) -> tuple[str, ...]:
    """A cell in the order of the table's head."""
    times = [
        _number(row[f"{key}_{share}"], 0 if key == "ttft_ms" else 1)
        for key in ("ttft_ms", "tpot_ms", "itl_ms") for share in ("p50", "p90", "p99")
    ]  # fmt: skip
    return (
        row["cell"], row["pd"], row["handoff"] or "–", row["drafter"], row["tree"] or "–", row["load"],
        _number(row["tokens_per_second"], 1), *times, _number(row["acceptance_length"], 2),
        _number(row["acceptance_length_not_repeated"], 2), _percent(row["repeated_8gram_share"]),
        _percent(row["good_share"]), _number(row["goodput_tokens_per_second"], 1),
        _number(row["cost_per_million_tokens"], 3),
        *(_percent(row.get(f"{key}_share")) for key in ("draft", "verify", "other", "busy")),
        _joules(row.get("joules_per_output_token")), _number(row.get("ttft_ms_turn_1_p50"), 0),
        _number(row.get("ttft_ms_later_turns_p50"), 0), _percent(row.get("cached_share")),
        _percent(row.get("cached_share_later_turns")),
    )  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _joules(value: float | None) -> str:
    return "not reported" if value is None else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
