"""``pdspec plan simulate`` and ``pdspec plan sweep``: traces on workers that exist in a clock alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdspec.cli.options import Json
from pdspec.cli.output import notes, only_json, print_json
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


def simulate(
    trace: Trace = None,
    rate: Rate = 0.0,
    seconds: Seconds = 0.0,
    prompt: Prompt = 2048,
    output: Output = 256,
    prefill: Annotated[int, typer.Option(min=0, help="Workers; 0: decode workers prefill.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Workers.")] = 1,
    times: Times = None,
    hardware: Hardware = "a100-80gb",
    model: Model = "llama-3.1-8b",
    drafter: Drafter = "eagle3",
    alpha: Alpha = 0.0,
    k: K = 0,
    devices: Devices = 1,
    kv_tokens: KvTokens = 0,
    max_batch: MaxBatch = 256,
    chunk: Chunk = 2048,
    ttft_ms: TtftMs = 1000.0,
    tpot_ms: TpotMs = 50.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """A trace on simulated workers, by the real router policy and schedulers: throughput, latencies, goodput."""
    with only_json(json):
        from pdspec.study.simulator.run import simulate as run

        requests, described = _requests(trace, rate, seconds, prompt, output, seed)
        known, room = _times(times, hardware, model, drafter, alpha, k, devices, max_batch)
        shape = _deployment(prefill, decode, kv_tokens or room, max_batch, chunk)
        result = {"trace": described, **run(requests, shape, known, goal=_goal(ttft_ms, tpot_ms), seed=seed),
                  "times": known.source, "prefix_reuse": "not simulated"}  # fmt: skip
    _show(result, json)


def sweep(
    trace: Trace = None,
    rate: Rate = 0.0,
    seconds: Seconds = 0.0,
    prompt: Prompt = 2048,
    output: Output = 256,
    workers: Annotated[int, typer.Option(min=3, help="That are split into prefill and decode.")] = 8,
    times: Times = None,
    hardware: Hardware = "a100-80gb",
    model: Model = "llama-3.1-8b",
    drafter: Drafter = "eagle3",
    alpha: Alpha = 0.0,
    k: K = 0,
    devices: Devices = 1,
    kv_tokens: KvTokens = 0,
    max_batch: MaxBatch = 256,
    chunk: Chunk = 2048,
    ttft_ms: TtftMs = 1000.0,
    tpot_ms: TpotMs = 50.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Every split of some workers into prefill and decode: the rate each serves well, and the knee between them."""
    with only_json(json):
        from pdspec.study.simulator.sweep import sweep as run

        requests, described = _requests(trace, rate, seconds, prompt, output, seed)
        known, room = _times(times, hardware, model, drafter, alpha, k, devices, max_batch)
        shape = _deployment(1, 1, kv_tokens or room, max_batch, chunk)
        result = run(requests, workers, shape, known, _goal(ttft_ms, tpot_ms), seed=seed, progress=notes().print)
        result |= {"trace": described, "times": known.source}
    _show(result, json)


def _requests(
    trace: Path | None, rate: float, seconds: float, prompt: int, output: int, seed: int
) -> tuple[list[TraceRequest], dict[str, float]]:
    from pdspec.study.simulator.traces import read_trace, repeated, scaled, summary, synthetic

    if trace is None:
        found = synthetic(rate=rate or 1.0, seconds=seconds or 60.0, prompt=prompt, output=output, seed=seed)
    else:
        found = read_trace(trace)
        if rate:
            found = scaled(found, rate=rate / summary(found)["rate"])
        if seconds:
            found = repeated(found, seconds)
    return found, summary(found)


def _times(
    path: Path | None, hardware: str, model: str, drafter: str, alpha: float, k: int, devices: int, batch: int
) -> tuple[WorkerTimes, int]:
    """The times, and the KV tokens of a worker. A roofline's K is the best at a quarter of a full batch."""
    from pdspec.study.simulator.times import WorkerTimes, of_plan

    if path is not None:
        values = read_file(path)
        return WorkerTimes.from_json(values.get("times", values)), int(values.get("kv_tokens", 65536))
    from pdspec.study.plan import advice, report
    from pdspec.study.plan.drafts import TYPICAL_ALPHA

    question = report.Question(hardware=hardware, model=model, devices=devices)
    target = report.target_of(question)
    cost = report.draft_cost(drafter, target)
    chance = alpha or TYPICAL_ALPHA.get(drafter, TYPICAL_ALPHA["draft_model"])
    load = advice.Load(batch=max(1, batch // 4))
    setting = advice.best_chain(target, cost, chance, load, drafts=k if drafter != "none" else 0)
    room = target.tokens_held(beside=cost.weight_bytes)
    if room < 1:
        from pdspec.errors import ConfigError

        raise ConfigError(f"{model} does not fit", field="--devices", remedy="split it over more devices")
    return of_plan(target, cost, setting, chance), room


def _deployment(prefill: int, decode: int, kv_tokens: int, max_batch: int, chunk: int) -> Deployment:
    from pdspec.study.simulator.run import Deployment

    return Deployment(prefill=prefill, decode=decode, kv_tokens=kv_tokens, max_batch=max_batch, chunk=chunk)


def _goal(ttft_ms: float, tpot_ms: float) -> Goal:
    from pdspec.study.simulator.run import Goal

    return Goal(ttft_s=ttft_ms / 1e3, tpot_s=tpot_ms / 1e3)


def _show(result: dict[str, Any], json: bool) -> None:
    if json:
        print_json(result)
        return
    for name, value in result.items():
        print(f"{name}: {value}")
