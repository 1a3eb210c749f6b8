"""Times of forwards by their bytes and operations: the larger of both, and what every forward costs beside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pdspec.engine.steptimes import VerifyTimes
from pdspec.study.plan.hardware import Hardware
from pdspec.study.plan.shapes import Shape

ROWS = (*range(1, 17), *range(18, 33, 2), *range(40, 129, 8), *range(160, 513, 32), 768, 1024)


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """A decoder on ``devices`` of one kind, split tensor-parallel. Seconds and bytes."""

    hardware: Hardware
    shape: Shape
    devices: int = 1

    def forward_s(self, rows: int, kv_tokens: float = 0.0, context: float = 0.0) -> float:
        """A forward of ``rows`` rows that reads the KV of ``kv_tokens`` tokens in all; each row attends to ``context``
        of them. Rows of one sequence share what they read, those of several do not."""
        read = self.shape.read_bytes(rows) + kv_tokens * self.shape.kv_bytes
        memory = read / (self.hardware.read * self.devices)
        compute = self.shape.flops(rows, context) / (self.hardware.compute * self.devices)
        return max(memory, compute) + self.overhead_s

    @property
    def overhead_s(self) -> float:
        """Of any forward: launches and sampling; two reductions a layer where the model is split."""
        split = 2 * self.shape.config.num_layers * self.hardware.all_reduce_s if self.devices > 1 else 0.0
        return self.hardware.forward_s + split

    def step_s(self, batch: int, nodes: int, context: float) -> float:
        """A verification of ``nodes`` draft nodes for each of ``batch`` sequences of ``context`` tokens."""
        return self.forward_s(batch * (1 + nodes), batch * context, context)

    def prefill_s(self, tokens: int, chunk: int = 2048) -> float:
        """A whole prompt in chunks; a row attends to half of the prompt on average."""
        chunks = max(1, -(-tokens // chunk))
        compute = self.shape.flops(tokens, tokens / 2) / (self.hardware.compute * self.devices)
        read = self.shape.read_bytes(min(tokens, chunk)) / (self.hardware.read * self.devices)
        return max(compute, chunks * read) + chunks * self.overhead_s

    def tokens_held(self, reserve: float = 0.1, beside: float = 0.0) -> int:
        """KV tokens that fit beside the weights and ``beside`` bytes more, with ``reserve`` of the memory left over; 0
        where the weights alone do not fit."""
        free = self.hardware.memory * self.devices * (1 - reserve) - self.shape.weight_bytes - beside
        return max(0, int(free / self.shape.kv_bytes))

    def verify_times(self, context: float) -> VerifyTimes:
        """As the engine's table of measured times, for its budget policy and the simulator."""
        seconds = np.array([self.forward_s(rows, 0.0, context) for rows in ROWS])
        kv = self.shape.kv_bytes / (self.hardware.read * self.devices)
        return VerifyTimes(rows=np.array(ROWS), seconds=np.maximum.accumulate(seconds), kv_seconds=kv)
