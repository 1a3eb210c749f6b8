"""How loaded the two roles are, and whether a worker of one should serve the other: pure functions of what the router
lists (``pdspec scale``). Seconds throughout.

    prefill   pressure = wait / ttft goal              wait = prompt tokens that wait / tokens computed per second
    decode    pressure = max(wait / ttft goal,         wait = answers that wait x length x tpot / answers that run
                             tpot / tpot goal)         tpot = seconds of a step / tokens per verification

Speculation counts: an answer's tokens come as fast as drafts are accepted. Answers are taken to reach their max_tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Workers = Sequence[Mapping[str, Any]]  # as ``RouterClient.workers`` gives them
Requests = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What users should not wait longer for. A role has room below ``slack`` of its pressure's 1."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1
    slack: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Load:
    """Of the ready workers of one role."""

    workers: tuple[str, ...]  # addresses, least loaded first
    wait_s: float  # until a request that comes now begins
    tpot_s: float  # 0 for prefill, and where nothing was decoded yet
    acceptance_length: float  # tokens per verification; 0: none was seen
    pressure: float


@dataclass(frozen=True, kw_only=True)
class Move:
    """Advice: the worker at ``address`` should serve ``role``."""

    address: str
    role: str
    why: str


def prefill_load(workers: Workers, goals: Goals) -> Load:
    """A role without a worker that computed anything yet has no wait."""
    ready = _ready(workers, "prefill")
    backlog = sum(_figure(one, "prefill_backlog_tokens") for one in ready)
    rate = sum(_figure(one, "prefill_tokens_per_second") for one in ready)
    wait = backlog / rate if rate else 0.0
    return Load(workers=_least_first(ready), wait_s=wait, tpot_s=0.0, acceptance_length=0.0,
                pressure=wait / goals.ttft_s)


def decode_load(workers: Workers, requests: Requests, goals: Goals, *, acceptance_length: float) -> Load:
    """``acceptance_length``: tokens per verification lately. What no worker has yet waits at the router."""
    ready = _ready(workers, "decode")
    running, queued = (sum(int(one[name]) for one in ready) for name in ("running", "queued"))
    waiting = queued + max(0, len(requests) - running - queued)
    steps = [step for one in ready if (step := _figure(one, "step_seconds")) > 0]
    tpot = sum(steps) / len(steps) / max(1.0, acceptance_length) if steps else 0.0
    length = sum(int(one["max_tokens"]) for one in requests) / len(requests) if requests else 0.0
    wait = waiting * length * tpot / max(1, running)
    return Load(workers=_least_first(ready), wait_s=wait, tpot_s=tpot, acceptance_length=acceptance_length,
                pressure=max(wait / goals.ttft_s, tpot / goals.tpot_s if running else 0.0))


def advise(prefill: Load, decode: Load, goals: Goals) -> Move | None:
    """The least loaded worker of a role with room, to a role whose pressure is above 1; a role keeps its last one."""
    for tight, roomy, role in ((prefill, decode, "prefill"), (decode, prefill, "decode")):
        if tight.workers and tight.pressure > 1.0 and roomy.pressure < goals.slack and len(roomy.workers) > 1:
            why = f"{role} pressure {tight.pressure:.2f} (wait {tight.wait_s:.2f} s, tpot {1e3 * tight.tpot_s:.0f} ms,"
            why += f" {tight.acceptance_length:.2f} tokens per verification), the other role's {roomy.pressure:.2f}"
            return Move(address=roomy.workers[0], role=role, why=why)
    return None


def acceptance(now: Workers, before: Workers) -> float:
    """Tokens per verification of the decode workers between two looks; 0 where nothing was verified."""
    tokens, verifications = (_grown(now, before, name) for name in ("generation_tokens", "verifications"))
    return tokens / verifications if verifications > 0 else 0.0


def _grown(now: Workers, before: Workers, name: str) -> float:
    known = {one["address"]: _figure(one, name) for one in before}
    return sum(max(0.0, _figure(one, name) - known.get(one["address"], 0.0)) for one in now if one["role"] == "decode")


def _ready(workers: Workers, role: str) -> list[Mapping[str, Any]]:
    return [one for one in workers if one["role"] == role and one["state"] == "ready"]


def _least_first(workers: Workers) -> tuple[str, ...]:
    return tuple(one["address"] for one in sorted(workers, key=lambda one: one["running"] + one["queued"]))


def _figure(worker: Mapping[str, Any], name: str) -> float:
    value = float(worker["metrics"].get(name, 0.0))
    return value if math.isfinite(value) and value > 0 else 0.0
