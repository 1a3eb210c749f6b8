"""``pdspec check plan``: predictions against figures that are known, counted or measured.

textbook   the closed form's worked example
drafters   speed-ups measured on one prompt set predict those on another
real       the simulator, with calibrated times, against real 1P1D and 2P2D runs
scale      an hour on 1,000 workers, and the knee of a P:D sweep
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.settings import unknown_name
from pdspec.spec.registry import family
from pdspec.study.heads import at_hand, worker_config
from pdspec.study.plan import advice, report
from pdspec.study.plan.closed import expected_of
from pdspec.study.plan.drafts import draft_cost
from pdspec.study.simulator.calibrate import calibrate, differences, real
from pdspec.study.simulator.run import Deployment, Goal, measured, simulate
from pdspec.study.simulator.sweep import sweep
from pdspec.study.simulator.times import of_plan
from pdspec.study.simulator.traces import synthetic
from pdspec.study.ways import REMEMBERING, Way, prompt_ids
from pdspec.types import GenerationStats

Progress = Callable[[str], object]
Counted = dict[str, list[tuple[float, GenerationStats]]]  # by drafter: (decode seconds, counts) of each answer
PARTS = ("textbook", "drafters", "real", "scale")
SPEEDUP, THROUGHPUT, P99, SCALE_S = 0.10, 0.10, 0.20, 60.0


def run(
    *, worker: dict[str, Any], parts: Sequence[str], drafters: Sequence[str], prompts: str | None, num_prompts: int,
    max_tokens: int, requests: int, load: float, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``parts`` (none: all). ``requests`` and ``load`` (share of what one pair can serve) are of the real runs."""
    for part in parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS, field="--parts", where="check plan")
    found: dict[str, Any] = {}
    for part in parts or PARTS:
        began = time.perf_counter()
        if part == "textbook":
            found[part] = _textbook()
        elif part == "scale":
            found[part] = _scale(progress)
        else:
            names = tuple(drafters) or tuple(name for name in at_hand(worker) if name not in REMEMBERING)
            config = worker_config(worker, names if part == "drafters" else ("none", "eagle3"))
            ids = prompt_ids(config, prompts, num_prompts)
            if part == "drafters":
                found[part] = _drafters(config, names, ids, max_tokens, progress)
            else:
                found[part] = _real(config, ids, requests, load, progress)
        found[part]["seconds"] = time.perf_counter() - began
        progress(f"{part}: {'ok' if found[part]['ok'] else 'FAILED'}")
    return {"ok": all(part["ok"] for part in found.values()), **found}


def _textbook() -> dict[str, Any]:
    values = report.answer(report.case("a100-llama2-13b"))
    kept = {name: values[name] for name in ("expected_tokens", "ms_per_token", "baseline_ms_per_token", "speedup")}
    share = values["memory"]["draft_share"]
    fine = abs(kept["expected_tokens"] - 3.3616) < 1e-3 and 6.7 <= kept["ms_per_token"] <= 7.0
    fine = fine and abs(kept["baseline_ms_per_token"] - 20) < 0.3 and 2.85 <= kept["speedup"] <= 3.0 and share < 0.01
    return {"ok": fine, **kept, "draft_share": share}


def _drafters(
    config: WorkerConfig, names: Sequence[str], ids: Sequence[tuple[int, ...]], max_tokens: int, progress: Progress
) -> dict[str, Any]:
    """Every second prompt calibrates, the others are predicted. Prompts of all drafters in turns."""
    generator = LocalGenerator(config)
    try:
        own = [_counted(generator, names, half, max_tokens, progress) for half in (ids[::2], ids[1::2])]
    finally:
        generator.resources.close()
    rows = {}
    for name in names:
        if name == "none":
            continue
        predicted, found = _predicted(own[0], name), _speedup(own[1], name)
        rows[name] = {"predicted": predicted, "measured": found, "error": predicted / found - 1.0}
        progress(f"{name}: predicted {predicted:.3f}x, measured {found:.3f}x")
    return {"ok": all(abs(row["error"]) <= SPEEDUP for row in rows.values()), "rows": rows, "prompts": len(ids)}


def _counted(
    generator: LocalGenerator, names: Sequence[str], ids: Sequence[tuple[int, ...]], max_tokens: int, progress: Progress
) -> Counted:
    found: Counted = {name: [] for name in dict.fromkeys(("none", *names))}
    ways = {name: Way(drafter=name, tree=family(name).DESCRIPTION.default_tree, temperature=0.0) for name in found}
    clocks = generator.decode.clocks
    for number in range(len(ids)):
        for name, way in ways.items():
            before = sum(clocks.values())
            chunks = list(generator.generate(way.requests(ids, max_tokens)[number]))
            found[name].append((sum(clocks.values()) - before, chunks[-1].stats or GenerationStats()))
        progress(f"prompt {number + 1} of {len(ids)}")
    return found


def _step(rows: Sequence[tuple[float, GenerationStats]]) -> float:
    return sum(seconds for seconds, _ in rows) / max(1, sum(stats.verifications for _, stats in rows))


def _speedup(counted: Counted, name: str) -> float:
    """Of seconds per output token."""
    plain, own = counted["none"], counted[name]
    rates = [sum(s.output_tokens - 1 for _, s in rows) / sum(seconds for seconds, _ in rows) for rows in (own, plain)]
    return rates[0] / rates[1]


def _predicted(counted: Counted, name: str) -> float:
    """E · T_target / T_step: acceptance by depth, and the times of steps with and without drafts."""
    own = counted[name]
    depth = max((len(stats.reached_per_position) for _, stats in own), default=0)
    totals = [[0, 0] for _ in range(depth)]
    for _, stats in own:
        for place, (hit, of) in enumerate(zip(stats.accepted_per_position, stats.reached_per_position, strict=True)):
            totals[place][0] += hit
            totals[place][1] += of
    drafted = totals[0][1] / max(1, sum(stats.verifications for _, stats in own)) if depth else 0.0
    chances = [hit / of for hit, of in totals if of]
    expected = 1.0 + drafted * (expected_of(chances) - 1.0)  # where nothing was drafted, a step gives one token
    return expected * _step(counted["none"]) / _step(own)


def _real(
    config: WorkerConfig, ids: Sequence[tuple[int, ...]], requests: int, load: float, progress: Progress
) -> dict[str, Any]:
    """Open-loop arrivals at ``load`` of what one pair could serve."""
    drafter, tree = "eagle3", family("eagle3").DESCRIPTION.default_tree
    config = config.replace(threads=config.threads or 1)
    times = calibrate(config, ids, drafter=drafter, tree=tree, progress=progress)
    prompt, output = 96, 48
    busy = times.prefill([(0, prompt)]) + output / times.expected_tokens * times.step(1, prompt)
    rows: dict[str, Any] = {}
    for count in (1, 2):
        seconds = requests * busy / load
        rate = requests / seconds
        trace = synthetic(rate=rate, seconds=seconds, prompt=prompt, output=output, spread=0.4, seed=count)
        shape = Deployment(
            prefill=count, decode=count, kv_tokens=config.cache_tokens, max_batch=config.max_batch, chunk=config.chunk,
            shared=True,
        )  # fmt: skip
        simulated = simulate(trace, shape, times)
        seen = measured(
            real(config, ids, trace, prefill=count, decode=count, drafter=drafter, tree=tree, progress=progress), None
        )
        apart = differences(simulated, seen)
        fine = abs(apart["throughput"]) <= THROUGHPUT and abs(apart["p50"]) <= THROUGHPUT and abs(apart["p99"]) <= P99
        rows[f"{count}P{count}D"] = {"ok": fine, "error": apart, "simulated": simulated, "measured": seen}
        progress(f"{count}P{count}D: " + ", ".join(f"{name} {value:+.1%}" for name, value in apart.items()))
    return {"ok": all(row["ok"] for row in rows.values()), **rows, "times": times.to_json()}


def _scale(progress: Progress) -> dict[str, Any]:
    question = report.Question(hardware="h100-80gb", model="llama-3.1-8b", drafter="eagle3")
    target = report.target_of(question)
    cost = draft_cost("eagle3", target)
    setting = advice.best_chain(target, cost, 0.8, advice.Load(batch=32))
    times = of_plan(target, cost, setting, 0.8)
    shape = Deployment(prefill=300, decode=700, kv_tokens=400_000, max_batch=256, chunk=2048)
    trace = synthetic(rate=20, seconds=3600, prompt=4000, output=300)
    began = time.process_time()
    found = simulate(trace, shape, times, goal=Goal())
    own = time.process_time() - began
    progress(f"an hour, {len(trace)} requests, 1,000 workers: {found['wall_s']:.1f} s, {own:.1f} s of a core")
    swept = sweep(
        synthetic(rate=20, seconds=40, prompt=2000, output=300), 8, shape, times, Goal(ttft_s=0.5, tpot_s=0.01),
        progress=progress,
    )  # fmt: skip
    fine = found["wall_s"] < SCALE_S and found["requests"] == len(trace) and swept["interior"]
    return {"ok": fine, "hour": found, "core_seconds": own, "sweep": swept}
