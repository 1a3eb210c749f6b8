"""``pdspec study run``: the cells of a study that are not measured yet, on one local deployment per topology.

Processes are started once for all cells that differ in drafter, handoff or load alone: a request says which drafter it
wants. Before a drafter's first cell one short answer is thrown away.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pdspec.prompts import Prompt, load_prompts
from pdspec.study.cells import tables
from pdspec.study.cells.client import Asked, Opened, RouterSource, Row, send
from pdspec.study.cells.grid import Cell, StudyConfig, cells, prompts_file
from pdspec.study.cells.loads import parse_load
from pdspec.study.cells.openai_source import OpenAISource
from pdspec.study.cells.requests import Chats, Requests
from pdspec.study.cells.store import Store
from pdspec.study.heads import worker_config
from pdspec.study.stack import Stack

Progress = Callable[[str], object]
Advance = Callable[[int, int], object]

def run(
    study: StudyConfig, out: str | Path, *, progress: Progress, advance: Advance = lambda done, of: None
) -> dict[str, Any]:
    """Measure what is missing in ``out``. ``advance`` hears how many requests are answered, of how many that this run
    sends. Raises ConfigError, and the first error of a deployment: the same call goes on with what is missing."""
    tables.needed("pyarrow.parquet")
    grid, store = cells(study), Store(out)
    prompts = load_prompts(prompts_file(study.workload))
    with store.held():
        if (count := store.describe(study, grid)) > 1:
            progress(f"{out} was begun on another machine or with other versions: {count} are in study.json, runs")
        missing = [cell for cell in grid if not store.has(cell)]
        progress(f"{len(grid)} cells, {len(grid) - len(missing)} of them complete")
        clock = Clock(missing, progress, advance)
        stacks: dict[tuple[object, ...], list[Cell]] = {}
        for cell in missing:
            stacks.setdefault(cell.stack, []).append(cell)
        for found in stacks.values():
            _on_one_stack(found, [cell.drafter for cell in grid], prompts, store, clock)
        table = tables.write(store, study, grid)
    return {"ok": True, "out": str(out), "measured": len(missing), "cells": table}


class Clock:
    """How far a run is, and when it should be done."""

    def __init__(self, missing: Sequence[Cell], progress: Progress, advance: Advance) -> None:
        self.cells, self.requests = len(missing), sum(cell.requests for cell in missing)
        self.stacks = len({cell.stack for cell in missing})
        self.progress, self._advance = progress, advance
        self.done = self.answered = self._started = 0
        self._cells_s = self._starts_s = 0.0

    def stack(self, seconds: float) -> None:
        """One more deployment stands."""
        self._started, self._starts_s = self._started + 1, self._starts_s + seconds

    def request(self) -> None:
        """One more is answered."""
        self.answered += 1
        self._advance(self.answered, self.requests)

    def cell(self, cell: Cell, tokens: int, seconds: float) -> None:
        """One more is complete."""
        self.done, self._cells_s = self.done + 1, self._cells_s + seconds
        left = self._cells_s / self.answered * (self.requests - self.answered)
        left += self._starts_s / max(1, self._started) * (self.stacks - self._started)
        self.progress(
            f"{self.done}/{self.cells} {cell.id} {cell}: {tokens / seconds:.1f} tokens/s in {seconds:.0f} s,"
            f" {left / 60:.1f} min left"
        )


def _on_one_stack(
    found: Sequence[Cell], drafters: Sequence[str], prompts: Sequence[Prompt], store: Store, clock: Clock
) -> None:
    """All drafters of the study are loaded, also where only one is left to measure: as in a run without a break."""
    first, began = found[0], time.monotonic()
    if first.endpoint:
        clock.stack(0.0)
        _in_turn(found, lambda: source_of(first.endpoint), Chats(prompts), store, clock)
        return
    config = worker_config({"model": first.model, **json.loads(first.worker)}, drafters)
    made = Requests(config, prompts)
    with Stack(config, prefill=first.prefill, decode=first.decode, progress=clock.progress) as stack:
        clock.stack(time.monotonic() - began)
        _in_turn(found, lambda: RouterSource(stack.endpoint), made, store, clock)


def source_of(endpoint: str) -> Opened:
    """Of ``live HOST:PORT`` or ``openai URL``; a token comes from PDSPEC_TOKEN or OPENAI_API_KEY."""
    kind, _, where = endpoint.partition(" ")
    if kind == "openai":
        return OpenAISource(where, os.environ.get("OPENAI_API_KEY", ""))
    return RouterSource(where, os.environ.get("PDSPEC_TOKEN", ""))


def _in_turn(
    found: Sequence[Cell], source: Callable[[], Opened], made: Requests | Chats, store: Store, clock: Clock
) -> None:
    warm = set[tuple[str, str]]()
    for cell in found:
        if (cell.drafter, cell.tree) not in warm:
            send(source(), made.warming(cell), parse_load("closed 1"), seed=0, on_row=lambda row: None)
            warm.add((cell.drafter, cell.tree))
        measure(source(), cell, made.of(cell), store, clock)


def measure(source: Opened, cell: Cell, asked: Sequence[Asked], store: Store, clock: Clock) -> None:
    """One cell. Raises what ``send`` raises; the cell is missing then."""
    began, tokens = time.monotonic(), 0
    with store.writing(cell) as write:

        def on_row(row: Row) -> None:
            nonlocal tokens
            tokens += row["output_tokens"]
            write(row)
            clock.request()

        send(source, asked, parse_load(cell.load), seed=cell.seed, on_row=on_row)
    clock.cell(cell, tokens, time.monotonic() - began)
