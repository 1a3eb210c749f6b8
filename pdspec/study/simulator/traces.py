"""Request traces: when each request came, and how many tokens its prompt and answer had.

Mooncake   JSON lines {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}
Azure      CSV with TIMESTAMP,ContextTokens,GeneratedTokens (AzureLLMInferenceTrace_*.csv)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from pdspec.errors import ConfigError

BLOCK = 512  # prompt tokens that a Mooncake hash stands for
_REMEDY = "give a Mooncake trace (.jsonl) or an Azure LLM inference trace (.csv)"


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """``arrival_s`` counts from the trace's first request. ``blocks`` name the prompt's 512-token blocks where known:
    equal prefixes have equal names."""

    arrival_s: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()


def read_trace(path: str | Path) -> list[TraceRequest]:
    """In order of arrival. Raises ConfigError naming file and line."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            found = list(_azure(path, file) if first.startswith("TIMESTAMP") else _mooncake(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="--trace", remedy=_REMEDY) from error
    if not found:
        raise ConfigError(f"{path} holds no request", field="--trace", remedy=_REMEDY)
    found.sort(key=lambda one: one.arrival_s)
    return [replace(one, arrival_s=one.arrival_s - found[0].arrival_s) for one in found]


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            yield _checked(
                float(values["timestamp"]) / 1e3, int(values["input_length"]), int(values["output_length"]),
                tuple(int(one) for one in values.get("hash_ids", ())),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, number, error) from error


def _azure(path: Path, lines: Iterator[str]) -> Iterator[TraceRequest]:
    for number, row in enumerate(csv.DictReader(lines), 2):
        try:
            whole, _, fraction = row["TIMESTAMP"].replace("+00:00", "").partition(".")
            arrival = datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")
            yield _checked(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, number, error) from error


def _checked(arrival_s: float, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> TraceRequest:
    if prompt < 1 or output < 0:
        raise ValueError(f"{prompt} prompt and {output} output tokens")
    return TraceRequest(arrival_s=arrival_s, prompt=prompt, output=max(1, output), blocks=blocks)


def _broken(path: Path, number: int, error: Exception) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {error!r}", field="--trace", remedy=_REMEDY)


def synthetic(
    *, rate: float, seconds: float, prompt: float, output: float, spread: float = 0.8, seed: int = 0,
) -> list[TraceRequest]:  # fmt: skip
    """Poisson arrivals at ``rate`` per second; lengths log-normal with those means and ``spread`` (sigma)."""
    random = np.random.default_rng(seed)
    count = random.poisson(rate * seconds)
    arrivals = np.sort(random.uniform(0.0, seconds, count))
    lengths = [
        np.maximum(1, random.lognormal(np.log(mean) - spread**2 / 2, spread, count)).astype(int)
        for mean in (prompt, output)
    ]
    return [
        TraceRequest(arrival_s=when, prompt=first, output=second)
        for when, first, second in zip(arrivals.tolist(), *(one.tolist() for one in lengths), strict=True)
    ]


def scaled(trace: Sequence[TraceRequest], *, rate: float) -> list[TraceRequest]:
    """The same requests ``rate`` times as fast."""
    return [replace(one, arrival_s=one.arrival_s / rate) for one in trace]


def repeated(trace: Sequence[TraceRequest], seconds: float, *, times: int = 1) -> list[TraceRequest]:
    """The trace over and over until ``seconds``, ``times`` of it at once, each copy a little later."""
    span = trace[-1].arrival_s + (trace[-1].arrival_s / max(1, len(trace) - 1) or 1.0)
    found = [
        replace(one, arrival_s=one.arrival_s + lap * span + copy * span / max(1, times))
        for lap in range(int(seconds // span) + 1) for copy in range(times) for one in trace
    ]  # fmt: skip
    return sorted((one for one in found if one.arrival_s < seconds), key=lambda one: one.arrival_s)


def summary(trace: Sequence[TraceRequest]) -> dict[str, float]:
    """Requests, rate and lengths; ``prefix_share``: of prompt tokens in blocks that an earlier request had, too."""
    seen: set[int] = set()
    shared = 0
    for one in trace:
        shared += sum(block in seen for block in one.blocks) * BLOCK
        seen.update(one.blocks)
    prompts, outputs = [one.prompt for one in trace], [one.output for one in trace]
    span = trace[-1].arrival_s or 1.0
    return {
        "requests": len(trace), "seconds": trace[-1].arrival_s, "rate": len(trace) / span,
        "prompt_mean": float(np.mean(prompts)), "prompt_p99": float(np.percentile(prompts, 99)),
        "output_mean": float(np.mean(outputs)), "output_p99": float(np.percentile(outputs, 99)),
        "prefix_share": min(1.0, shared / sum(prompts)),
    }  # fmt: skip
