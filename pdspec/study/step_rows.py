"""What more rows cost a target forward, and what one draft row costs, measured in turns, each beside its floor.

The floor is the larger of bytes ÷ bandwidth (every weight is read once) and operations ÷ rate (two per weight and row).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from pdspec.config import WorkerConfig
from pdspec.model.loader import load_weights, resolve
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.study.draft_vocab import draft_row, in_turns, verification
from pdspec.study.machine import matrix_rate, read_bandwidth, weight_bytes
from pdspec.telemetry import usable_cores
from pdspec.train.data import load_target

ROWS = (1, 2, 4, 8, 16, 24)
AT_MOST = {8: 1.35, 16: 1.6}  # times one row
DRAFT_AT_MOST, DRAFT_VOCABULARY = 0.08, 8192


def measured(config: WorkerConfig, rounds: int = 60) -> dict[str, Any]:
    """Milliseconds by rows and of a draft row (an EAGLE-3 head of random weights), ratios to one row, floors. Raises
    ConfigError."""
    threads, cache_dir = config.threads or usable_cores(), config.cache_dir or None
    bandwidth = read_bandwidth(threads)
    low = config.dtype == "bfloat16"
    rate = matrix_rate(threads, dtype=torch.bfloat16 if low else torch.float32)
    files = resolve(config.model, cache_dir)
    vocabulary = min(DRAFT_VOCABULARY, files.config.vocab_size)
    target = load_target(config.model, dtype=config.dtype, threads=threads, cache_dir=cache_dir)
    try:
        draft = draft_row(target, load_weights(files, config.dtype), vocabulary)
        *forwards, drafted = in_turns([*(verification(target, rows) for rows in ROWS), draft], rounds)
    finally:
        target.runner.ops.close()

    def floor_ms(num_bytes: int, rows: int) -> float:
        return 1e3 * max(num_bytes / bandwidth, 2 * rows * (num_bytes / (2 if low else 4)) / rate)

    shapes = Eagle3Config.for_target(files.config, vocabulary).matrix_shapes()
    read = (2 if low else 4) * sum(prod(shape) for name, shape in shapes.items() if name != "fc.weight")
    return {
        "read_bytes_per_second": bandwidth, "operations_per_second": rate,
        "rows": {
            str(rows): {"ms": ms, "ratio": ms / forwards[0],
                        "floor_ms": floor_ms(weight_bytes(files.config, config.dtype), rows)}
            for rows, ms in zip(ROWS, forwards, strict=True)
        },
        "draft_row": {"vocabulary": vocabulary, "ms": drafted, "ratio": drafted / forwards[0],
                      "floor_ms": floor_ms(read, 1)},
    }  # fmt: skip


def floors(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of ``measured``."""
    rows = [
        {"name": f"rows_{rows}", "wanted": wanted, "found": found["rows"][str(rows)]["ratio"]}
        for rows, wanted in AT_MOST.items()
    ]
    return [*rows, {"name": "draft_row", "wanted": DRAFT_AT_MOST, "found": found["draft_row"]["ratio"]}]
