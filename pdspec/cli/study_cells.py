"""``pdspec study run`` and ``pdspec study report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pdspec.cli.options import Json
from pdspec.cli.output import notes, only_json, print_json


def run(
    file: Annotated[Path, typer.Argument(help="The study as YAML or TOML, e.g. examples/long_cot.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of results, where a killed study goes on (default: build/NAME).")
    ] = None,
    json: Json = False,
) -> None:
    """A grid of models, drafters, topologies, handoffs and loads, each cell measured once and kept."""
    with only_json(json):
        from pdspec.study.cells.grid import StudyConfig
        from pdspec.study.cells.run import run as study

        columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = notes()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("requests", total=None)
            result = study(
                StudyConfig.load(file), out or Path("build") / file.stem,
                progress=lambda text: console.print(text, soft_wrap=True),
                advance=lambda done, of: bar.update(task, completed=done, total=of),
            )  # fmt: skip
    if json:
        print_json(result)
        return
    for row in result["cells"]:
        print(line(row))


def line(row: dict[str, Any]) -> str:
    """A cell for people."""
    name = " ".join(part for part in (row["pd"], row["handoff"], row["drafter"], row["load"]) if part)
    parts = [f"{row['cell']} {name}: {row['tokens_per_second']:.1f} tokens/s"]
    for title, key in (("TTFT", "ttft_ms"), ("per token", "tpot_ms")):
        if row[f"{key}_p50"] is not None:
            parts.append(f"{title} P50 {row[f'{key}_p50']:.0f} ms P90 {row[f'{key}_p90']:.0f} ms")
    if row["acceptance_length"] is not None:
        parts.append(f"{row['acceptance_length']:.2f} tokens per verification")
    if row["draft_share"] is not None:
        parts.append(f"drafting {row['draft_share']:.0%} of decode steps")
    if row["ttft_ms_later_turns_p50"] is not None:
        parts.append(f"later turns TTFT P50 {row['ttft_ms_later_turns_p50']:.0f} ms")
    if row["joules_per_output_token"] is not None:
        parts.append(f"{row['joules_per_output_token']:.3g} J per token")
    return ", ".join(parts)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `pdspec study run --out` wrote.")],
    json: Json = False,
) -> None:
    """One page of pictures that opens offline (report.html), and the same as Markdown with PNG files."""
    with only_json(json):
        from pdspec.study.cells.report import report as write

        result = write(folder)
    if json:
        print_json(result)
        return
    print(f"wrote {result['html']} and {result['markdown']}")
