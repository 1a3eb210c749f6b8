"""A worker as a Ray actor: a plain class; ``pdspec.cluster`` wraps and places it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

import ray

from pdspec.config import WorkerConfig
from pdspec.errors import PdspecError
from pdspec.hosting import EXIT_STATUS, Host, RunningWorker, claim_cores, launcher, settle

log = logging.getLogger(__name__)


class WorkerActor(Host):
    """Runs one worker's service and registers its address with the actor named ``router`` whenever it starts, in
    whatever role. ``configs`` by role, ``role`` is the first; ``host`` empty: this node's own address.

    A drained worker without a new role ends its process, and Ray starts it anew in its first.
    """

    def __init__(self, configs: Mapping[str, WorkerConfig], role: str, router: str) -> None:
        here = ray.util.get_node_ip_address()
        self._configs = {name: config.replace(host=config.host or here) for name, config in configs.items()}
        self._router, self._role = router, role
        config = self._configs[role]
        super().__init__(
            lambda: _launch(config),
            announce=self._register,
            restarted=ray.get_runtime_context().was_current_actor_reconstructed,
            name=config.worker_id,
            log_level=config.log_level,
            log_format=config.log_format,
        )

    def _register(self, address: str) -> None:
        worker_id = self._configs[self._role].worker_id
        ray.get(ray.get_actor(self._router).register.remote(worker_id, self._role, address))

    def _look(self) -> None:
        running: RunningWorker = self.running()  # type: ignore[assignment]
        wish = running.wish()
        if wish is None:
            return
        port = int(running.address.rpartition(":")[2])
        running.drain(wish.deadline_s, threading.Event())
        running.stop()
        if wish.role not in self._configs:  # none was named, or one that this worker's settings do not have
            log.info("drained (%r was asked for); ending the process, for Ray to start it anew", wish.role)
            os._exit(EXIT_STATUS)
        del running
        self._running, self._role = None, wish.role
        settle()  # weights and cache are given back before there are others
        try:
            self._running = _launch(self._configs[wish.role].replace(port=port))
        except PdspecError as error:
            log.error("no start as a %s worker: %s; ending the process", wish.role, error)
            os._exit(EXIT_STATUS)
        settle()
        self._register(self._running.address)


def _launch(config: WorkerConfig) -> RunningWorker:
    claim_cores(config.threads)  # before torch is imported
    launch = launcher(config.role)
    if config.tp == 1:
        return launch(config)
    from pdspec.parallel.actor import ray_ranks

    return launch(config, ray_ranks(config.threads))
