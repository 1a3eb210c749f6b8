"""Other ranks as Ray actors: rank r sits in bundle r of the worker's placement group, which lies on one node."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pdspec.hosting import claim_cores
from pdspec.parallel.ranks import StartRank

READY_S = 60.0  # Ray starts a process


class RankActor:
    """Serves one rank in its own process. It belongs to rank 0's actor: when that ends, Ray ends this."""

    def __init__(self, folder: str, rank: int, threads: int) -> None:
        claim_cores(threads)  # before the import below, which loads torch
        self._folder, self._rank = Path(folder), rank

    def serve(self) -> None:
        """Until rank 0 is gone."""
        from pdspec.parallel.follower import Follower

        Follower(self._folder, self._rank).serve()


class _RayRank:
    """See ``ranks.Started``."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._served = actor, actor.serve.remote()
        self._stopped = threading.Event()

    def alive(self) -> bool:
        return not self._stopped.is_set() and not ray.wait([self._served], timeout=0)[0]

    def stop(self) -> None:
        self._stopped.set()
        ray.kill(self._actor)


def ray_ranks(threads: int) -> StartRank:
    """Starts ranks in the placement group of the actor that calls this; each claims ``threads`` threads."""
    group = ray.util.get_current_placement_group()

    def start(folder: Path, rank: int) -> _RayRank:
        bundle = group.bundle_specs[rank]
        actor = ray.remote(RankActor).options(
            num_cpus=bundle.get("CPU", 0), num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
        )  # fmt: skip
        return _RayRank(actor.remote(str(folder), rank, threads))

    return start
