"""Which P:D serves most: for each split of the same workers, the highest rate at which requests stay good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pdspec.errors import ConfigError
from pdspec.study.simulator.run import Deployment, Goal, simulate
from pdspec.study.simulator.times import WorkerTimes
from pdspec.study.simulator.traces import TraceRequest, scaled, summary

GOOD_SHARE = 0.9
_SPLITS = 12
_HALVINGS = 6
_FURTHEST = 64.0  # times the trace's own rate, up and down


def sweep(
    trace: Sequence[TraceRequest], workers: int, deployment: Deployment, times: WorkerTimes, goal: Goal,
    *, seed: int = 0, progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Rows by number of prefill workers, each with the ``requests_per_second`` that it serves with ``GOOD_SHARE`` of
    them good, and what bounds it; ``knee`` is the best. Raises ConfigError for fewer than 3 workers."""
    if workers < 3:
        raise ConfigError("there is nothing to split", field="--workers", remedy="sweep at least 3")
    own = summary(trace)["rate"]
    rows: list[dict[str, Any]] = []
    for prefill in splits(workers):
        shape = replace(deployment, prefill=prefill, decode=workers - prefill)
        rate, at_rate = _highest(trace, shape, times, goal, seed)
        rows.append({
            "prefill": prefill, "decode": workers - prefill, "requests_per_second": rate * own,
            "per_worker": rate * own / workers, "bound_by": _bound(trace, shape, times, goal, rate * 1.2, seed),
            **{name: at_rate[name] for name in ("ttft_ms", "tpot_ms", "tokens_per_second") if name in at_rate},
        })  # fmt: skip
        progress(f"{prefill}:{workers - prefill}: {rate * own:.2f} requests/s, then {rows[-1]['bound_by']}")
    best = max(range(len(rows)), key=lambda index: rows[index]["requests_per_second"])
    return {
        "workers": workers, "goal": {"ttft_s": goal.ttft_s, "tpot_s": goal.tpot_s, "share": GOOD_SHARE},
        "rows": rows, "knee": {name: rows[best][name] for name in ("prefill", "decode", "requests_per_second")},
        "interior": 0 < best < len(rows) - 1,
    }  # fmt: skip


def splits(workers: int) -> list[int]:
    """Numbers of prefill workers: all, or of many workers a dozen spread out."""
    if workers <= _SPLITS + 1:
        return list(range(1, workers))
    return sorted({max(1, round(workers * part / (_SPLITS + 1))) for part in range(1, _SPLITS + 1)})


def _highest(
    trace: Sequence[TraceRequest], shape: Deployment, times: WorkerTimes, goal: Goal, seed: int
) -> tuple[float, dict[str, Any]]:
    """The rate, as a multiple of the trace's, and what happens at it; by doubling, then by halving the gap."""

    def good(rate: float) -> tuple[bool, dict[str, Any]]:
        found = simulate(scaled(trace, rate=rate), shape, times, goal=goal, seed=seed)
        asked = found["requests"] + found["turned_away"]
        return bool(asked) and found.get("good_share", 0.0) * found["requests"] >= GOOD_SHARE * asked, found

    low, high = 0.0, 1.0
    best: dict[str, Any] = {}
    fine, found = good(high)
    if fine:
        while fine and high < _FURTHEST:
            low, best, high = high, found, 2 * high
            fine, found = good(high)
    else:
        while not fine and high > 1 / _FURTHEST:
            high /= 2
            fine, found = good(high)
        if not fine:
            return 0.0, found
        low, best, high = high, found, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fine, found = good(middle)
        if fine:
            low, best = middle, found
        else:
            high = middle
    return low, best


def _bound(
    trace: Sequence[TraceRequest], shape: Deployment, times: WorkerTimes, goal: Goal, rate: float, seed: int
) -> str:
    """What fails first a little beyond: the wait for prefill, or for a place in a decode batch and its steps."""
    if rate <= 0:
        return "goal out of reach"
    found = simulate(scaled(trace, rate=rate), shape, times, goal=goal, seed=seed)
    slow_first = found["ttft_ms"]["p90"] / (1e3 * goal.ttft_s)
    slow_later = found["tpot_ms"].get("p90", 0.0) / (1e3 * goal.tpot_s)
    return "ttft" if slow_first >= slow_later else "tpot"
