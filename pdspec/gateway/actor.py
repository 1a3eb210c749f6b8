"""The HTTP front as a Ray actor: a plain class; ``pdspec.cluster`` wraps and places it."""

from __future__ import annotations

from typing import Any

import ray

from pdspec.config import HttpConfig
from pdspec.hosting import Host, Running


class HttpActor(Host):
    """Runs the HTTP front in a process of its own, so that JSON never holds up the router's tokens."""

    def __init__(self, config: HttpConfig) -> None:
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        logs: dict[str, Any] = {"log_level": config.log_level, "log_format": config.log_format}
        super().__init__(lambda: _launch(config), restarted=restarted, name="http", **logs)


def _launch(config: HttpConfig) -> Running:
    from pdspec.gateway.service import launch

    return launch(config)
