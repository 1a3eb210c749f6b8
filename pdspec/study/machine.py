"""What this machine can do at best: the floors that stand beside every figure."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod

import torch

from pdspec.model.config import ModelConfig, weight_shapes


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Fastest of ``repeats`` runs after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def read_bandwidth(threads: int, megabytes: int = 768) -> float:
    """Bytes per second that ``threads`` threads read from memory (a sum over float32 far larger than any cache)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(megabytes << 18)
        return data.nbytes / best_seconds(data.sum)
    finally:
        torch.set_num_threads(before)


def matrix_rate(threads: int, size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations per second of a matrix product in torch's own library."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        return 2.0 * size**3 / best_seconds(lambda: a @ b)
    finally:
        torch.set_num_threads(before)


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Of the whole target in ``dtype``: what a plain step reads at least."""
    return sum(prod(shape) for shape in weight_shapes(model).values()) * (2 if dtype == "bfloat16" else 4)
