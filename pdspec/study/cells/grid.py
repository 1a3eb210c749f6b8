"""A study as one YAML file, and the cells that its grid consists of.

    study = StudyConfig.load("examples/long_cot.yaml")
    for cell in cells(study):
        print(cell.id, cell.pd, cell.drafter, cell.load)

A cell is nothing but values; its id is a hash of them. Whatever would change a figure is a value of the cell (the
prompts' content, the threads of a worker), what only judges figures (goals, a price) is none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from pdspec.config import HANDOFFS
from pdspec.errors import ConfigError
from pdspec.settings import Settings, option, unknown_name
from pdspec.spec.registry import family
from pdspec.study.cells.chats import FOLLOW_UPS
from pdspec.study.cells.loads import parse_load
from pdspec.study.simulator.traces import read_trace
from pdspec.study.ways import REMEMBERING
from pdspec.study.workloads import workload
from pdspec.telemetry import usable_cores

_PD = re.compile(r"(\d+)P(\d+)D")
_ADDED = {"turns": 1, "prompt_tokens": 0}  # no part of an id at these values: older studies go on


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkloadConfig(Settings):
    """What is asked: the same requests in every cell."""

    prompts: str = option("word_problems", "a set's name, or a JSON Lines file of prompts")
    requests: int = option(16, "of a cell; prompts come again, with other seeds, where the set has fewer", low=1)
    samples: int = option(1, "answers to each prompt, next to each other", low=1)
    turns: int = option(1, "requests of a conversation; each sends the answers before it back", low=1)
    prompt_tokens: int = option(0, "of a first turn, by texts of the other prompts before it; 0: as it is", low=0)
    max_tokens: int = option(512, "of an answer", low=2)
    temperature: float = option(0.6, "0: greedy", low=0)
    top_p: float = option(0.95, "1: off", low=0, high=1)
    ignore_eos: bool = option(True, "answers are max_tokens long")
    seed: int = option(0, "of the first request; the others count on from it", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SloConfig(Settings):
    """What a good request keeps; both hold."""

    ttft_ms: float = option(2000.0, "to the first token", low=0)
    tpot_ms: float = option(100.0, "of each token after it, on average", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig(Settings):
    """models x drafters x pd x handoffs x loads."""

    name: str = option("study", "title of the report")
    models: tuple[str, ...] = option(("smollm2-135m",), "targets")
    drafters: tuple[str, ...] = option(("none", "ngram"), "families, with a tree if not the default: eagle3 chain(3)")
    pd: tuple[str, ...] = option(
        ("0P1D", "1P1D"), "workers (0P: colocated, decode workers prefill), live HOST:PORT of a router, or openai URL"
    )
    handoffs: tuple[str, ...] = option(("direct",), "paths of the KV; colocated cells have none")
    loads: tuple[str, ...] = option(
        ("closed 4",), "closed N, poisson RATE, bursty RATE SIZE, or trace FILE SPEED; rates in requests per second"
    )
    workload: WorkloadConfig = dataclasses.field(default_factory=WorkloadConfig)
    worker: dict[str, Any] = option({}, "keys of a worker's settings")
    slo: SloConfig = dataclasses.field(default_factory=SloConfig)
    price_per_hour: float = option(0.0, "of the machine that a cell runs on; 0: no cost is shown", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement. ``worker`` is JSON: the settings of the workers beside those named here. ``endpoint`` is that of
    a deployment which is there already, of which nothing else is known: 0 workers."""

    model: str
    drafter: str
    tree: str
    prefill: int
    decode: int
    handoff: str  # empty: colocated, or as the endpoint has it
    endpoint: str  # empty: own processes
    load: str
    prompts: str
    input_sha256: str  # of the prompts, and of the trace where there is one
    requests: int
    samples: int
    turns: int
    prompt_tokens: int
    max_tokens: int
    temperature: float
    top_p: float
    ignore_eos: bool
    seed: int
    worker: str

    @property
    def id(self) -> str:
        """Twelve hex digits of the values' hash."""
        known = {name: value for name, value in dataclasses.asdict(self).items() if _ADDED.get(name) != value}
        values = json.dumps(known, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(values.encode()).hexdigest()[:12]

    @property
    def pd(self) -> str:
        """The workers as a study file writes them."""
        return self.endpoint or f"{self.prefill}P{self.decode}D"

    @property
    def stack(self) -> tuple[str, int, int, str, str, str]:
        """Cells that agree in this run on the same processes. A drafter that remembers answers gets new ones for each
        cell: it would know all answers from the cell before."""
        alone = self.id if self.drafter in REMEMBERING else ""
        return self.model, self.prefill, self.decode, self.worker, self.endpoint, alone

    def __str__(self) -> str:
        return " ".join(part for part in (self.pd, self.handoff, self.drafter, self.tree, self.load) if part)


def cells(study: StudyConfig) -> list[Cell]:
    """The grid, each cell once, those of one stack after each other. Raises ConfigError and UnknownName."""
    file = prompts_file(study.workload)
    _check(study)
    asked = study.workload.to_mapping()
    found = [
        Cell(
            model=model, drafter=drafter, tree=tree, prefill=prefill, decode=decode, handoff=handoff, load=load,
            worker="{}" if endpoint else _worker(study, prefill + decode), endpoint=endpoint,
            input_sha256=_digest(file, load, study.workload.turns), **asked,
        )
        for model, (endpoint, prefill, decode) in product(study.models, map(_workers, study.pd))
        for load, (drafter, tree), handoff in product(
            map(_load, study.loads), _drafters(study, endpoint), _handoffs(study, prefill)
        )
    ]  # fmt: skip
    if not found:
        raise ConfigError("the study has no cell", field="drafters", remedy="name models, drafters, pd and loads")
    return list({cell.id: cell for cell in found}.values())


def prompts_file(asked: WorkloadConfig) -> Path:
    """Of a set or a file. Raises ConfigError."""
    return Path(asked.prompts) if Path(asked.prompts).is_file() else Path(workload(asked.prompts))


def _check(study: StudyConfig) -> None:
    """Values of a workload that do not go together."""
    asked = study.workload
    if left := asked.requests % asked.turns:
        message = f"{asked.requests} requests are no whole conversations of {asked.turns} turns"
        remedy = f"give {asked.requests - left + asked.turns}"
        raise ConfigError(message, field="requests", remedy=remedy)
    traced = [load for load in study.loads if parse_load(load).kind == "trace"]
    for name, neutral in _ADDED.items():
        if traced and getattr(asked, name) != neutral:
            message = f"{traced[0]!r} has conversations and lengths of its own"
            raise ConfigError(message, field=name, remedy=f"leave {name} out, or the trace")


def _workers(text: str) -> tuple[str, int, int]:
    """(endpoint, prefill, decode); either there is an endpoint or there are workers."""
    kind, _, where = text.partition(" ")
    if kind in ("live", "openai") and where:
        return text, 0, 0
    found = _PD.fullmatch(text)
    if not found or not int(found[2]):
        remedy = "write 0P1D (colocated), 1P1D, 2P2D, ..., live HOST:PORT, or openai URL"
        raise ConfigError(f"{text!r} names no workers", field="pd", remedy=remedy)
    return "", int(found[1]), int(found[2])


def _load(text: str) -> str:
    return str(parse_load(text))


def _digest(prompts: Path, load: str, turns: int) -> str:
    """Raises ConfigError for a trace that cannot be read."""
    found = hashlib.sha256(prompts.read_bytes())
    if turns > 1:
        found.update("\n".join(FOLLOW_UPS).encode())
    if trace := parse_load(load).file:
        read_trace(trace)
        found.update(Path(trace).read_bytes())
    return found.hexdigest()


def _handoffs(study: StudyConfig, prefill: int) -> tuple[str, ...]:
    for name in study.handoffs:
        if name not in HANDOFFS:
            raise unknown_name("handoff", name, HANDOFFS, field="handoffs")
    return study.handoffs if prefill else ("",)


def _drafters(study: StudyConfig, endpoint: str) -> Iterator[tuple[str, str]]:
    if endpoint.startswith("openai "):
        yield "served", ""
        return
    for text in study.drafters:
        name, _, tree = text.partition(" ")
        described = family(name, tuple(study.worker.get("plugins", ()))).DESCRIPTION
        yield name, tree.strip() or described.default_tree


def _worker(study: StudyConfig, workers: int) -> str:
    """The cores are shared out evenly, so that every topology has the same hardware."""
    share = {"threads": max(1, usable_cores() // workers)}
    return json.dumps({**share, **study.worker}, sort_keys=True)
