"""The prefill worker as a Ray actor: a plain class; ``pdspec.cluster`` wraps and places it."""

from __future__ import annotations

import ray

from pdspec.config import WorkerConfig
from pdspec.hosting import Host, Running, claim_cores


class PrefillActor(Host):
    """Runs one prefill service and registers its address with the actor named ``router``, after a restart once more.

    ``config.host`` empty: this node's own address.
    """

    def __init__(self, config: WorkerConfig, router: str) -> None:
        config = config.replace(host=config.host or ray.util.get_node_ip_address())
        super().__init__(
            lambda: _launch(config),
            announce=lambda address: ray.get(
                ray.get_actor(router).register.remote(config.worker_id, config.role, address)
            ),
            restarted=ray.get_runtime_context().was_current_actor_reconstructed,
            name=config.worker_id,
            log_level=config.log_level,
            log_format=config.log_format,
        )


def _launch(config: WorkerConfig) -> Running:
    claim_cores(config.threads)  # before the imports below, which load torch
    from prefill_worker.service import launch

    if config.tp == 1:
        return launch(config)
    from pdspec.parallel.actor import ray_ranks

    return launch(config, ray_ranks(config.threads))
