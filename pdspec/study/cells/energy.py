"""Joules of this machine while something runs: RAPL of its CPU packages and their memory, NVML of its NVIDIA GPUs.

    meter = EnergyMeter(counters())
    ...  # meter.tick() now and then: a counter may wrap around once between two of them
    meter.stop()  # {"package-0": 812.5, "gpu-0": 4021.0}

The counters know no process: whatever else runs counts, and an idle machine needs energy, too. RAPL: the power capping
framework of Linux (Documentation/power/powercap); NVML: nvmlDeviceGetTotalEnergyConsumption, through pynvml.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
_MEMORY = "dram"


@dataclass(frozen=True, kw_only=True)
class EnergyCounter:
    """``read`` gives joules since some moment, and raises OSError. Beyond ``wraps_at`` (0: never) it begins anew."""

    name: str
    read: Callable[[], float]
    wraps_at: float = 0.0


class EnergyMeter:
    """The joules of each counter from here on."""

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        self._counters, self.failed = counters, ""
        self._last = [0.0] * len(counters)
        self._joules = [0.0] * len(counters)
        self._read(lambda place, value: None)

    def tick(self) -> None:
        """Add what was used since the last time."""
        self._read(self._add)

    def stop(self) -> dict[str, float]:
        """By counter; empty where there are none, or one of them ended on the way (``failed`` says which)."""
        self.tick()
        names = [counter.name for counter in self._counters]
        return {} if self.failed else dict(zip(names, self._joules, strict=True))

    def _read(self, use: Callable[[int, float], None]) -> None:
        for place, counter in enumerate(self._counters):
            try:
                value = counter.read()
            except OSError as error:
                self.failed = f"{counter.name}: {error}"
                continue
            use(place, value)
            self._last[place] = value

    def _add(self, place: int, value: float) -> None:
        counter, before = self._counters[place], self._last[place]
        if value < before and not counter.wraps_at:
            self.failed = f"{counter.name} went back"
        self._joules[place] += passed(before, value, counter.wraps_at)


def passed(before: float, now: float, wraps_at: float) -> float:
    """Joules between two readings of a counter that wrapped around at most once."""
    return now - before if now >= before else now - before + wraps_at


def counters() -> tuple[EnergyCounter, ...]:
    """All that this machine has and this user may read."""
    return (*rapl(POWERCAP), *nvml())


def rapl(folder: Path) -> list[EnergyCounter]:
    """The packages under ``folder`` and their memory. Other zones are parts of a package, or (psys) hold one."""
    found = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            limit = float((zone / "max_energy_range_uj").read_text()) / 1e6
            read = partial(_microjoules, zone / "energy_uj")
            read()
        except (OSError, ValueError):  # the kernel lets root alone read it: the study then says "not reported"
            continue
        if name.startswith("package") or name == _MEMORY:
            label = f"{name}-{zone.name.split(':')[1]}" if name == _MEMORY else name
            found.append(EnergyCounter(name=label, read=read, wraps_at=limit))
    return found


def nvml() -> list[EnergyCounter]:
    """The GPUs, where pynvml is installed and they count (Volta and later)."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver
        return []
    found = []
    for place, handle in enumerate(handles):
        read = partial(_millijoules, pynvml, handle)
        try:
            read()
        except OSError:  # this GPU does not count
            continue
        found.append(EnergyCounter(name=f"gpu-{place}", read=read))
    return found


def _microjoules(path: Path) -> float:
    return float(path.read_text()) / 1e6


def _millijoules(pynvml: Any, handle: Any) -> float:
    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except pynvml.NVMLError as error:
        raise OSError(str(error)) from error
