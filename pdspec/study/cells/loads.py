"""When requests come: ``closed N`` (N are under way at any time), or at moments of their own, whoever waits."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

from pdspec.errors import ConfigError
from pdspec.study.simulator.traces import TraceRequest, read_trace, scaled

_REMEDY = "write closed N, poisson RATE, bursty RATE SIZE, or trace FILE SPEED"


@dataclass(frozen=True, kw_only=True)
class Load:
    """``rate`` in requests per second (of a trace: its speed-up), ``size`` requests of a burst or under way."""

    kind: str
    size: int = 1
    rate: float = 0.0
    file: str = ""

    def __str__(self) -> str:
        words = {
            "closed": (self.size,), "poisson": (f"{self.rate:g}",), "bursty": (f"{self.rate:g}", self.size),
            "trace": (self.file, f"{self.rate:g}"),
        }  # fmt: skip
        return " ".join(map(str, (self.kind, *words[self.kind])))


def parse_load(text: str) -> Load:
    """Raises ConfigError."""
    try:
        match text.split():
            case ["closed", size]:
                found = Load(kind="closed", size=int(size))
            case ["poisson", rate]:
                found = Load(kind="poisson", rate=float(rate))
            case ["bursty", rate, size]:
                found = Load(kind="bursty", rate=float(rate), size=int(size))
            case ["trace", file]:
                found = Load(kind="trace", file=file, rate=1.0)
            case ["trace", file, speed]:
                found = Load(kind="trace", file=file, rate=float(speed))
            case _:
                raise ValueError("unknown form")
        if found.size < 1 or (found.kind != "closed" and not 0.0 < found.rate < float("inf")):
            raise ValueError("out of range")
    except ValueError as error:
        raise ConfigError(f"{text!r} is no load: {error}", field="loads", remedy=_REMEDY) from error
    return found


def starts(load: Load, count: int, seed: int) -> list[float]:
    """Seconds at which ``count`` requests of an open load come, the first at 0; the same for the same seed."""
    draw = random.Random(seed)
    if load.kind == "poisson":
        return list(accumulate((draw.expovariate(load.rate) for _ in range(count - 1)), initial=0.0))
    if load.kind == "bursty":
        bursts = -(-count // load.size)
        moments = accumulate((draw.expovariate(load.rate / load.size) for _ in range(bursts - 1)), initial=0.0)
        return [moment for moment in moments for _ in range(load.size)][:count]
    return [one.arrival_s for one in of_trace(load, count)]


def of_trace(load: Load, count: int) -> list[TraceRequest]:
    """The first ``count`` requests of a trace at its speed. Raises ConfigError where it has fewer."""
    found = scaled(read_trace(load.file), rate=load.rate)[:count]
    if len(found) < count:
        remedy = f"at most {len(found)} requests with this trace"
        raise ConfigError(f"{load.file} has {len(found)} requests, not {count}", field="requests", remedy=remedy)
    return found
