"""The router and its relay as Ray actors: plain classes; ``pdspec.cluster`` wraps and places them."""

from __future__ import annotations

import logging
from typing import Any

import ray

from pdspec.config import RouterConfig
from pdspec.hosting import Host, Running

log = logging.getLogger(__name__)
ASK_TIMEOUT_S = 2.0


class RouterActor(Host):
    """Runs the router service and keeps its list of workers.

    Workers register themselves whenever they start; ``workers`` are (id, role, actor name) of each, asked when
    the router itself was restarted and has forgotten them.
    """

    def __init__(self, config: RouterConfig, workers: tuple[tuple[str, str, str], ...]) -> None:
        self._addresses: dict[str, tuple[str, str]] = {}  # worker id -> (role, address)
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        logs: dict[str, Any] = {"log_level": config.log_level, "log_format": config.log_format}
        super().__init__(lambda: _launch(config), restarted=restarted, name="router", **logs)
        if restarted:
            self._recall(workers)

    def register(self, worker_id: str, role: str, address: str) -> None:
        """Route to ``address`` from now on; the worker's earlier address is forgotten. Safe to repeat."""
        self._addresses[worker_id] = (role, address)
        self._publish()

    def workers(self) -> dict[str, tuple[str, str]]:
        """(role, address) of each registered worker by id."""
        return dict(self._addresses)

    def _publish(self) -> None:
        chosen = {role: tuple(a for r, a in self._addresses.values() if r == role) for role in ("prefill", "decode")}
        self.running().set_workers(prefill=chosen["prefill"], decode=chosen["decode"])  # type: ignore[attr-defined]

    def _recall(self, workers: tuple[tuple[str, str, str], ...]) -> None:
        for worker_id, role, actor in workers:
            try:
                handle: Any = ray.get_actor(actor)
                address = ray.get(handle.address.remote(), timeout=ASK_TIMEOUT_S)
            except (ValueError, ray.exceptions.RayError) as error:  # gone or starting: it will register itself
                log.info("%s does not answer yet: %s", worker_id, type(error).__name__)
                continue
            if address:
                self._addresses[worker_id] = (role, address)
        self._publish()


class RelayActor(Host):
    """Runs the relay: a process of its own, so that KV frames never wait behind tokens."""

    def __init__(self, config: RouterConfig) -> None:
        config = config.replace(host=config.host or ray.util.get_node_ip_address())
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        logs: dict[str, Any] = {"log_level": config.log_level, "log_format": config.log_format}
        super().__init__(lambda: _launch_relay(config), restarted=restarted, name="relay", **logs)


def _launch(config: RouterConfig) -> Running:
    from router.service import launch

    return launch(config)


def _launch_relay(config: RouterConfig) -> Running:
    from router.relay import launch

    return launch(config)
