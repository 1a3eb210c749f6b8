"""``pdspec bench mixed``: long prompts arrive while long answers decode; does anybody see the prefills?

The same requests at the same moments (an open loop: nobody waits for an answer before the next one comes) go to

* **disaggregated**: a prefill and a decode worker, one half of the cores each;
* **colocated**: one worker with all cores that prefills in chunks between its decode steps, for each chunk size.

All deployments stand at once, and take turns. What counts is the time between the pieces of the long answers while
prompts arrive, and the time to first token of these prompts: the colocated setting to beat is the one with the least
P99 among those that answer no later.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError, PdspecError
from pdspec.model.files import resolve
from pdspec.study.heads import worker_config
from pdspec.study.load import Load, Timed
from pdspec.study.processes import pin
from pdspec.study.stack import Stack
from pdspec.study.ways import prompt_ids
from pdspec.telemetry import core_ids
from pdspec.types import SamplingParams, UserRequest

Progress = Callable[[str], object]
WANTED = 1 / 3
DISAGGREGATED = "disaggregated"
_LEAD_S = 1.0  # the long answers are under way before the first prompt comes
_TAIL_TOKENS = 4  # of a prompt's answer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Requests and their moments: the ``answers`` begin at once, ``prompts`` come at ``arrivals`` seconds."""

    answers: tuple[UserRequest, ...]
    prompts: tuple[UserRequest, ...]
    arrivals: tuple[float, ...]


def run(
    *, worker: dict[str, Any], drafter: str, answers: int, prompt_tokens: int, rate: float, arrivals: int,
    step_ms: float, chunks: Sequence[int], runs: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``arrivals`` prompts of ``prompt_tokens``, ``rate`` a second, while ``answers`` are written; ``step_ms`` is the
    shortest time of a token, by which the answers are made long enough. Raises ConfigError on a single core, and
    PdspecError when the answers end before the last prompt is answered."""
    cores = core_ids()
    if len(cores) < 2:
        raise ConfigError("a prefill and a decode worker need a core each", field="threads", remedy="take two cores")
    config = worker_config({"drafter": drafter, **worker}, (drafter,))
    plan = make_plan(config, answers, prompt_tokens, rate, arrivals, step_ms)
    with ExitStack() as stack:
        loads = {DISAGGREGATED: stack.enter_context(Load(_apart(stack, config, cores, progress)))}
        for chunk in chunks:
            started = stack.enter_context(
                Stack(config, prefill=0, decode_changes={"chunk": chunk, "threads": len(cores)}, progress=progress)
            )
            loads[f"colocated {chunk}"] = stack.enter_context(Load(started.endpoint))
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
        for index in range(runs):
            names = list(loads)
            for name in (*names[index % len(names) :], *names[: index % len(names)]):
                rows[name].append(measure(loads[name], plan))
                progress(f"run {index + 1}, {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in rows[name][-1].items()))
    table = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    return verdict(table) | {
        "settings": table, "runs": rows, "answers": answers, "prompt_tokens": prompt_tokens, "rate": rate,
        "arrivals": arrivals, "drafter": drafter,
    }  # fmt: skip


def _apart(stack: ExitStack, config: WorkerConfig, cores: Sequence[int], progress: Progress) -> str:
    half = len(cores) // 2
    shares = {"prefill": cores[:half], "decode": cores[half:]}
    threads = {role: {"threads": len(share)} for role, share in shares.items()}
    started = stack.enter_context(
        Stack(config, prefill_changes=threads["prefill"], decode_changes=threads["decode"], progress=progress)
    )
    for role, share in shares.items():
        pin(started.processes[f"{role}-0"].pid, share)
    return started.endpoint


def make_plan(
    config: WorkerConfig, answers: int, prompt_tokens: int, rate: float, arrivals: int, step_ms: float
) -> Plan:
    """The same every time: exponential gaps from a fixed seed, prompts that share no prefix."""
    texts = prompt_ids(config, None, max(8, answers))
    words = [token for ids in texts for token in ids]
    draw = random.Random(7)
    moments = tuple(_LEAD_S + at for at in accumulate(draw.expovariate(rate) for _ in range(arrivals)))
    room = resolve(config.model, config.cache_dir or None).config.max_context - max(map(len, texts)) - 1
    tokens = min(room, int(1e3 * (moments[-1] + 4 * prompt_tokens / 1000) / step_ms))

    def request(ids: Sequence[int], count: int) -> UserRequest:
        params = SamplingParams(max_tokens=count, ignore_eos=True, seed=0)
        return UserRequest(prompt_ids=tuple(ids), drafter=config.drafter, sampling=params)

    return Plan(
        answers=tuple(request(ids, tokens) for ids in texts[:answers]),
        prompts=tuple(
            request(draw.choices(words, k=prompt_tokens), _TAIL_TOKENS) for _ in range(arrivals)
        ),
        arrivals=moments,
    )  # fmt: skip


def measure(load: Load, plan: Plan) -> dict[str, float]:
    """One run on one deployment. Milliseconds."""
    found = load.run(
        [*plan.answers, *plan.prompts], [0.0] * len(plan.answers) + list(plan.arrivals), until=len(plan.answers)
    )
    answers, prompts = found[: len(plan.answers)], found[len(plan.answers) :]
    began, ended = min(one.asked for one in prompts), max(one.times[0] for one in prompts)
    gaps = sorted(gap for one in answers for gap in _gaps(one, began, ended))
    if len(gaps) < 2 or any(one.complete for one in answers):
        message = "the answers ended before the last prompt was answered"
        raise PdspecError(message, remedy="a smaller --step-ms, or fewer --arrivals")
    ttft = sorted(one.ttft_s for one in prompts)
    return {
        "itl_p50_ms": 1e3 * _at(gaps, 0.5), "itl_p99_ms": 1e3 * _at(gaps, 0.99), "itl_max_ms": 1e3 * gaps[-1],
        "ttft_p50_ms": 1e3 * statistics.median(ttft), "ttft_p99_ms": 1e3 * _at(ttft, 0.99),
        "answer_tokens_per_second": len(gaps) / (ended - began),
    }  # fmt: skip


def _gaps(answer: Timed, began: float, ended: float) -> list[float]:
    """Between pieces of which the later one came while prompts arrived or were computed."""
    return [now - before for before, now in pairwise(answer.times) if began <= before and now <= ended]


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def verdict(table: dict[str, dict[str, float]]) -> dict[str, Any]:
    """P99 of the disaggregated setting over that of the best colocated one with a median TTFT no worse. Where none is
    as quick there is nothing to compare with: ``best`` is then the quickest, and ``ok`` false."""
    own = table[DISAGGREGATED]
    others = {name: row for name, row in table.items() if name != DISAGGREGATED}
    able = {name: row for name, row in others.items() if row["ttft_p50_ms"] <= own["ttft_p50_ms"]}
    if able:
        best = min(able, key=lambda name: able[name]["itl_p99_ms"])
    else:
        best = min(others, key=lambda name: others[name]["ttft_p50_ms"])
    ratio = own["itl_p99_ms"] / others[best]["itl_p99_ms"]
    return {
        "ok": bool(able) and ratio <= WANTED, "best_colocated": best, "as_quick": sorted(able), "wanted": WANTED,
        "itl_p99_ratio": ratio,
    }  # fmt: skip
