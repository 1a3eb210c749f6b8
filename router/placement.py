"""Whether a prompt is prefilled elsewhere or on the decode worker that answers it: a pure function of figures that the
workers measured (``prefill_choice: measured``).

    elsewhere   queue + max(compute, transfer) + overhead       transfer is exposed as far as it outlasts the compute
    here        queue + compute × (1 + running) + steps         each running answer waits for the prompt's chunks, too

Seconds of waiting are added up over the prompt and those that it holds up. ``here`` wins only where it is shorter and
both sides are known; a link that was not used lately is not known (``decode_worker/links.py``), so that a request now
and then measures it anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pdspec.types import LINK_LATENCY, LINK_OVERHEAD, LINK_RATE, WorkerInfo


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds; None where a figure is missing."""

    elsewhere: float | None
    here: float | None

    @property
    def choice(self) -> str:
        """"local", "remote", or "unknown", which goes the way of "remote"."""
        if self.elsewhere is None or self.here is None:
            return "unknown"
        return "local" if self.here < self.elsewhere else "remote"


def estimate(
    decode: WorkerInfo, prefill: WorkerInfo, *, link: str, missing: float, computed: float, running: int,
    waiting_tokens: int,
) -> Estimate:  # fmt: skip
    """Of a prompt of which the decode worker lacks ``missing`` tokens and the prefill worker would compute
    ``computed``. ``running`` are the decode worker's answers; ``waiting_tokens`` were sent to the prefill worker since
    it reported."""
    return Estimate(
        elsewhere=_elsewhere(decode, prefill, link, computed, missing, waiting_tokens),
        here=_here(decode, missing, running),
    )


def _elsewhere(
    decode: WorkerInfo, prefill: WorkerInfo, link: str, computed: float, missing: float, waiting: int
) -> float | None:
    queue = _compute(prefill, _or_zero(prefill, "prefill_backlog_tokens") + waiting)
    compute = _compute(prefill, computed)
    link_rate, size = _figure(decode, LINK_RATE + link), _figure(decode, "handoff_bytes_per_token")
    if queue is None or compute is None or link_rate is None or size is None:
        return None
    transfer = _or_zero(decode, LINK_LATENCY + link) + missing * size / link_rate
    return queue + max(compute, transfer) + _or_zero(decode, LINK_OVERHEAD + link)


def _here(decode: WorkerInfo, missing: float, running: int) -> float | None:
    before, compute = _compute(decode, _or_zero(decode, "prefill_backlog_tokens")), _compute(decode, missing)
    if before is None or compute is None:
        return None
    steps = _chunks(decode, missing) * _or_zero(decode, "step_seconds") if running else 0.0
    return before + compute * (1 + running) + steps


def _compute(info: WorkerInfo, tokens: float) -> float | None:
    """Seconds of a prefill's steps."""
    rate = _figure(info, "prefill_tokens_per_second")
    return None if rate is None else tokens / rate + _chunks(info, tokens) * _or_zero(info, "prefill_step_seconds")


def _chunks(info: WorkerInfo, tokens: float) -> int:
    return math.ceil(tokens / (_figure(info, "prefill_chunk") or max(tokens, 1.0)))


def _figure(info: WorkerInfo, name: str) -> float | None:
    """What a worker reported, where it is a size above 0."""
    value = info.metrics.get(name, 0.0)
    return value if math.isfinite(value) and value > 0 else None


def _or_zero(info: WorkerInfo, name: str) -> float:
    return _figure(info, name) or 0.0
