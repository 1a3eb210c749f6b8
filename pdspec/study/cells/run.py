"""``pdspec study run``: the cells of a study that are not measured yet, on one local deployment per topology.

Processes are started once for all cells that differ in drafter, handoff or load alone: a request says which drafter it
wants. Before a drafter's first cell one short answer is thrown away.
"""

from __future__ import annotations

import ipaddress
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pdspec.model.tokenizer import load_tokenizer
from pdspec.prompts import Prompt, load_prompts
from pdspec.study.cells import tables
from pdspec.study.cells.client import Opened, RouterSource, Row, send
from pdspec.study.cells.clocks import WorkerClocks, between
from pdspec.study.cells.energy import EnergyCounter, EnergyMeter, counters
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
        self.done = self.answered = self._started = self._passed = 0
        self._cells_s = self._starts_s = 0.0

    def stack(self, seconds: float) -> None:
        """One more deployment stands."""
        self._started, self._starts_s = self._started + 1, self._starts_s + seconds

    def request(self) -> None:
        """One more is answered."""
        self.answered += 1
        self._advance(self.answered, self.requests)

    def cell(self, cell: Cell, tokens: int, seconds: float) -> None:
        """One more is complete. Turns behind a refused one were never asked: they are over, too."""
        self.done, self._cells_s = self.done + 1, self._cells_s + seconds
        self._passed += cell.requests
        self.answered = self._passed
        left = self._cells_s / self.answered * (self.requests - self.answered)
        left += self._starts_s / max(1, self._started) * (self.stacks - self._started)
        self.progress(
            f"{self.done}/{self.cells} {cell.id} {cell}: {tokens / seconds:.1f} tokens/s in {seconds:.0f} s,"
            f" {left / 60:.1f} min left"
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Whoever answers a stack's cells, what is asked there, and what is known beside the answers: ``clocks`` of a
    router (None: it has none), and ``counters`` of energy where it runs on this machine."""

    source: Callable[[], Opened]
    chats: Chats
    clocks: WorkerClocks | None
    counters: tuple[EnergyCounter, ...]


def _on_one_stack(
    found: Sequence[Cell], drafters: Sequence[str], prompts: Sequence[Prompt], store: Store, clock: Clock
) -> None:
    """All drafters of the study are loaded, also where only one is left to measure: as in a run without a break."""
    first, began = found[0], time.monotonic()
    known = counters() if on_this_machine(first.endpoint) else ()
    if first.endpoint:
        clock.stack(0.0)
        tokenizer = load_tokenizer(first.model) if first.prompt_tokens else None
        chats = Chats(prompts, tokenizer=tokenizer, prompt_tokens=first.prompt_tokens)
        with clocks_of(first.endpoint) as clocks:
            place = Place(source=lambda: source_of(first.endpoint), chats=chats, clocks=clocks, counters=known)
            _in_turn(found, place, store, clock)
        return
    config = worker_config({"model": first.model, **json.loads(first.worker)}, drafters)
    chats = Requests(config, prompts, prompt_tokens=first.prompt_tokens)
    with Stack(config, prefill=first.prefill, decode=first.decode, progress=clock.progress) as stack:
        clock.stack(time.monotonic() - began)
        with WorkerClocks(stack.endpoint) as clocks:
            place = Place(source=lambda: RouterSource(stack.endpoint), chats=chats, clocks=clocks, counters=known)
            _in_turn(found, place, store, clock)


def source_of(endpoint: str) -> Opened:
    """Of ``live HOST:PORT`` or ``openai URL``; a token comes from PDSPEC_TOKEN or OPENAI_API_KEY."""
    kind, _, where = endpoint.partition(" ")
    if kind == "openai":
        return OpenAISource(where, os.environ.get("OPENAI_API_KEY", ""))
    return RouterSource(where, os.environ.get("PDSPEC_TOKEN", ""))


def clocks_of(endpoint: str) -> AbstractContextManager[WorkerClocks | None]:
    """Of ``live HOST:PORT``; servers with OpenAI's API tell nothing of the kind."""
    kind, _, where = endpoint.partition(" ")
    return WorkerClocks(where, os.environ.get("PDSPEC_TOKEN", "")) if kind == "live" else nullcontext()


def on_this_machine(endpoint: str) -> bool:
    """Whether this machine's counters of energy are those of the deployment: own processes, and loopback addresses."""
    _, _, where = endpoint.partition(" ")
    host = urlsplit(where if "//" in where else f"//{where}").hostname or ""
    try:
        return not endpoint or host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _in_turn(found: Sequence[Cell], place: Place, store: Store, clock: Clock) -> None:
    warm = set[tuple[str, str]]()
    for cell in found:
        if (cell.drafter, cell.tree) not in warm:
            _send(place, cell, warming=True, on_row=lambda row: None)
            warm.add((cell.drafter, cell.tree))
        measure(place, cell, store, clock)


def _send(place: Place, cell: Cell, *, warming: bool = False, on_row: Callable[[Row], object]) -> None:
    made = 0

    def note(row: Row) -> None:
        nonlocal made
        made += row["verifications"]
        on_row(row)

    asked, load = (place.chats.warming(cell), "closed 1") if warming else (place.chats.of(cell), cell.load)
    send(place.source(), asked, parse_load(load), seed=0 if warming else cell.seed, on_row=note)
    if place.clocks is not None:
        place.clocks.answered(made)


def measure(place: Place, cell: Cell, store: Store, clock: Clock) -> None:
    """One cell, and what it took as a whole. Raises what ``send`` raises; the cell is missing then."""
    tokens, before = 0, place.clocks.read() if place.clocks is not None else None
    with store.writing(cell) as write:

        def on_row(row: Row) -> None:
            nonlocal tokens
            tokens += row["output_tokens"]
            write(row)
            clock.request()
            meter.tick()

        meter, began = EnergyMeter(place.counters), time.monotonic()
        _send(place, cell, on_row=on_row)
        seconds, joules = time.monotonic() - began, meter.stop()
        clocks = between(before, place.clocks.read()) if place.clocks is not None else None
        write({"clocks": clocks, "joules": joules or None})
    if meter.failed:
        clock.progress(f"{cell.id}: no energy is known, {meter.failed}")
    if place.clocks is not None and clocks is None:
        clock.progress(f"{cell.id}: the router does not tell what its decode workers did, or they changed meanwhile")
    clock.cell(cell, tokens, seconds)
