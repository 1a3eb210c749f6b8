"""``pdspec plan simulate`` and ``pdspec plan sweep``: traces on workers that exist in a clock alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pdspec.cli.options import Json
from pdspec.cli.output import notes, only_json, print_json
from pdspec.cli.runs import with_options
from pdspec.settings import read_file

if TYPE_CHECKING:
    from pdspec.study.simulator.run import Deployment, Goal
    from pdspec.study.simulator.times import WorkerTimes
    from pdspec.study.simulator.traces import TraceRequest

Trace = Annotated[
    Path | None, typer.Option(help="Mooncake (.jsonl) or Azure (.csv) trace (default: drawn from --rate and lengths).")
]
Rate = Annotated[float, typer.Option(min=0.0, help="Requests per second (0: those of the trace; drawn: 1).")]
Seconds = Annotated[float, typer.Option(min=0.0, help="The trace over and over for so long (0: once; drawn: 60).")]
Prompt = Annotated[int, typer.Option(min=1, help="Mean tokens of a drawn prompt.")]
Output = Annotated[int, typer.Option(min=1, help="Mean tokens of a drawn answer.")]
Times = Annotated[
    Path | None, typer.Option(help="Step times of `pdspec plan calibrate` (default: a roofline of the flags below).")
]
Hardware = Annotated[str, typer.Option(help="As in `pdspec plan`.")]
Model = Annotated[str, typer.Option(help="As in `pdspec plan`.")]
Drafter = Annotated[str, typer.Option(help="As in `pdspec plan`; none: plain decoding.")]
Alpha = Annotated[float, typer.Option(help="As in `pdspec plan`.")]
K = Annotated[int, typer.Option(min=0, help="As in `pdspec plan`.")]
Devices = Annotated[int, typer.Option(min=1, help="As in `pdspec plan`.")]
KvTokens = Annotated[int, typer.Option(min=0, help="Of each worker (0: what fits beside weights and drafter).")]
MaxBatch = Annotated[int, typer.Option(min=1, help="Sequences of one decode worker.")]
Chunk = Annotated[int, typer.Option(min=1, help="Prompt tokens of one prefill step.")]
TtftMs = Annotated[float, typer.Option(help="A good request's first token comes within.")]
TpotMs = Annotated[float, typer.Option(help="And its others after each other within, on average.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """The options that both commands have: a trace, a worker's times and size, and what a good request is."""

    trace: Trace = None
    rate: Rate = 0.0
    seconds: Seconds = 0.0
    prompt: Prompt = 2048
    output: Output = 256
    times: Times = None
    hardware: Hardware = "a100-80gb"
    model: Model = "llama-3.1-8b"
    drafter: Drafter = "eagle3"
    alpha: Alpha = 0.0
    k: K = 0
    devices: Devices = 1
    kv_tokens: KvTokens = 0
    max_batch: MaxBatch = 256
    chunk: Chunk = 2048
    ttft_ms: TtftMs = 1000.0
    tpot_ms: TpotMs = 50.0
    seed: Seed = 0
    json: Json = False

    def requests(self) -> tuple[list[TraceRequest], dict[str, float]]:
        """The trace, and what it is like."""
        from pdspec.study.simulator.traces import read_trace, repeated, scaled, summary, synthetic

        if self.trace is None:
            found = synthetic(
                rate=self.rate or 1.0, seconds=self.seconds or 60.0, prompt=self.prompt, output=self.output,
                seed=self.seed,
            )  # fmt: skip
        else:
            found = read_trace(self.trace)
            if self.rate:
                found = scaled(found, rate=self.rate / summary(found)["rate"])
            if self.seconds:
                found = repeated(found, self.seconds)
        return found, summary(found)

    def known(self) -> tuple[WorkerTimes, int]:
        """The times, and the KV tokens of a worker. A roofline's K is the best at a quarter of a full batch."""
        from pdspec.study.simulator.times import WorkerTimes, of_plan

        if self.times is not None:
            values = read_file(self.times)
            return WorkerTimes.from_json(values.get("times", values)), int(values.get("kv_tokens", 65536))
        from pdspec.study.plan import advice, report
        from pdspec.study.plan.drafts import TYPICAL_ALPHA

        question = report.Question(hardware=self.hardware, model=self.model, devices=self.devices)
        target = report.target_of(question)
        cost = report.draft_cost(self.drafter, target)
        chance = self.alpha or TYPICAL_ALPHA.get(self.drafter, TYPICAL_ALPHA["draft_model"])
        load = advice.Load(batch=max(1, self.max_batch // 4))
        setting = advice.best_chain(target, cost, chance, load, drafts=self.k if self.drafter != "none" else 0)
        room = target.tokens_held(beside=cost.weight_bytes)
        if room < 1:
            from pdspec.errors import ConfigError

            raise ConfigError(f"{self.model} does not fit", field="--devices", remedy="split it over more devices")
        return of_plan(target, cost, setting, chance), room

    def deployment(self, prefill: int, decode: int, room: int) -> Deployment:
        """Of so many workers, each with ``room`` KV tokens unless the options say otherwise."""
        from pdspec.study.simulator.run import Deployment

        return Deployment(prefill=prefill, decode=decode, kv_tokens=self.kv_tokens or room, max_batch=self.max_batch,
                          chunk=self.chunk)  # fmt: skip

    def goal(self) -> Goal:
        """Of a good request."""
        from pdspec.study.simulator.run import Goal

        return Goal(ttft_s=self.ttft_ms / 1e3, tpot_s=self.tpot_ms / 1e3)


def _simulated(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of Simulated to a command that takes ``given``."""
    kinds = get_type_hints(Simulated, include_extras=True)
    values = [(one.name, kinds[one.name], one.default) for one in fields(Simulated)]

    def flat(**options: Any) -> None:
        shared = {name: options.pop(name) for name, _, _ in values}
        command(given=Simulated(**shared), **options)

    return with_options(command, "given", values, flat)


@_simulated
def simulate(
    prefill: Annotated[int, typer.Option(min=0, help="Workers; 0: decode workers prefill.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Workers.")] = 1,
    *,
    given: Simulated,
) -> None:
    """A trace on simulated workers, by the real router policy and schedulers: throughput, latencies, goodput."""
    with only_json(given.json):
        from pdspec.study.simulator.run import simulate as run

        requests, described = given.requests()
        known, room = given.known()
        shape = given.deployment(prefill, decode, room)
        result = {"trace": described, **run(requests, shape, known, goal=given.goal(), seed=given.seed),
                  "times": known.source, "prefix_reuse": "not simulated"}  # fmt: skip
    _show(result, given.json)


@_simulated
def sweep(
    workers: Annotated[int, typer.Option(min=3, help="That are split into prefill and decode.")] = 8,
    *,
    given: Simulated,
) -> None:
    """Every split of some workers into prefill and decode: the rate each serves well, and the knee between them."""
    with only_json(given.json):
        from pdspec.study.simulator.sweep import sweep as run

        requests, described = given.requests()
        known, room = given.known()
        shape = given.deployment(1, 1, room)
        result = run(requests, workers, shape, known, given.goal(), seed=given.seed, progress=notes().print)
        result |= {"trace": described, "times": known.source}
    _show(result, given.json)


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")
