"""What all ranks of one worker work out alike from its settings: rendezvous, threads, devices, refusals."""

from __future__ import annotations

import torch

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError
from pdspec.telemetry import usable_cores

SETTINGS = "worker.json"  # the WorkerConfig, in the rendezvous folder


def ready_key(rank: int) -> str:
    """Set in the store when a rank has loaded its part."""
    return f"ready/{rank}"


def threads_of(config: WorkerConfig) -> int:
    """CPU threads of each rank: an equal share of the worker's."""
    return max(1, (config.threads or usable_cores()) // config.tp)


def device_of(config: WorkerConfig, rank: int) -> str:
    """``cuda`` is one GPU for each rank, in order, and from the first again where there are fewer (Ray shows an actor
    its own alone)."""
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" and torch.cuda.is_available() else device


def refuse_what_one_rank_cannot(config: WorkerConfig) -> None:
    """Raises ConfigError for settings that need all heads, or a given order of sums, in one place."""
    if config.numerics == "exact":
        raise ConfigError(
            f"with tp {config.tp} sums are taken in another order than on one rank", field="numerics",
            remedy="use numerics fast on every worker: equality is then audited; or tp 1",
        )
    if config.options.get("sparse:select", "window") != "window" and "sparse" in config.drafters:
        raise ConfigError(
            "the attention of all heads is in no one place", field="options.sparse:select",
            remedy="use sparse:select=window, or tp 1",
        )
