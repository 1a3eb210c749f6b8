"""What accelerators can do, by their makers' data sheets, and what share of it real steps reach.

``bandwidth_share`` and ``compute_share`` are of well-written kernels: a step of batch 1 reads its weights at 0.8 to 0.9
of the sheet's bandwidth, a prefill of long chunks multiplies at about half of the dense rate. ``forward_s`` is what a
forward costs beside that: launches, the sampler, a synchronisation with the host. A calibration replaces all three.
"""

from __future__ import annotations

from dataclasses import dataclass

from pdspec.settings import unknown_name

GB, TB, TFLOP = 1e9, 1e12, 1e12


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device. Bytes, bytes per second, floating point operations per second (dense bf16), seconds."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float  # to the devices of another worker
    bandwidth_share: float = 0.86
    compute_share: float = 0.5
    forward_s: float = 0.6e-3
    all_reduce_s: float = 10e-6  # of one layer's half, where a model is split over devices

    @property
    def read(self) -> float:
        """Bytes per second that a step reads."""
        return self.bandwidth * self.bandwidth_share

    @property
    def compute(self) -> float:
        """Operations per second that a forward of many rows makes."""
        return self.flops * self.compute_share


def _of(name: str, memory: float, bandwidth: float, flops: float, link: float) -> Hardware:
    return Hardware(name=name, memory=memory * GB, bandwidth=bandwidth * GB, flops=flops * TFLOP, link=link * GB)


# Links are those between hosts: 200 or 400 Gbit/s a device, 100 Gbit/s where sheets name none.
HARDWARE = {
    one.name: one
    for one in (
        _of("a10", 24, 600, 125, 12.5),
        _of("l4", 24, 300, 121, 12.5),
        _of("l40s", 48, 864, 362, 12.5),
        _of("rtx-4090", 24, 1008, 165, 12.5),
        _of("a100-40gb", 40, 1555, 312, 25),
        _of("a100-80gb", 80, 2039, 312, 25),
        _of("h100-80gb", 80, 3350, 989, 50),
        _of("h200-141gb", 141, 4800, 989, 50),
        _of("b200-180gb", 180, 8000, 2250, 50),
        _of("mi300x-192gb", 192, 5300, 1307, 50),
    )
}


def hardware(name: str) -> Hardware:
    """Raises ConfigError, with the nearest name, for a device that the table lacks."""
    if name not in HARDWARE:
        raise unknown_name("hardware", name, tuple(HARDWARE), field="--hardware", where="the table")
    return HARDWARE[name]
