"""Ray topology: places workers, router and relay as actors, and wires them up.

Ray does placement, life cycle and restart; requests, tokens and KV travel over gRPC alone.

    driver (pdspec up) ── creates ──▶ router, relay          on the driver's node
                       ── creates ──▶ prefill-i, decode-j    in a placement group, over the nodes; a worker of
                                                             several ranks in one of its own, on one node
    worker, on every start ── register(id, role, address) ──▶ router

With no ``address`` a Ray cluster is started on this machine and ends with the driver (*embedded*). Its processes
share a token that only this process tree knows, whatever ``~/.ray/auth_token`` holds; a cluster that is joined
keeps its own authentication.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from pdspec.client import Access, RouterClient
from pdspec.config import ClusterConfig, HttpConfig, RouterConfig, WorkerConfig
from pdspec.errors import ConfigError, PdspecError, PeerLost
from pdspec.gateway.actor import HttpActor
from pdspec.placement import share
from pdspec.wire.status import error_from_dict
from pdspec.worker_actor import WorkerActor
from router.actor import RelayActor, RouterActor

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 << 20  # close to Ray's least: nothing of ours goes there
STOP_TIMEOUT_S = 5.0
Progress = Callable[[str], None]


def start_cluster(config: ClusterConfig, *, progress: Progress = log.info) -> Cluster:
    """Start every actor of ``config`` and return when the router calls all workers ready.

    Raises ConfigError when the cluster cannot be joined or has no room, and the worker's own error when one cannot
    start. Nothing is left running then.
    """
    cluster = Cluster(config, progress)
    try:
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    return cluster


class Cluster:
    """A running deployment. ``endpoint`` is the router's ``host:port``. ``stop`` ends all that was started."""

    def __init__(self, config: ClusterConfig, progress: Progress = log.info) -> None:
        self.config = config
        self.endpoint = ""
        self.http = ""  # the HTTP front's address, where there is one
        self.relay = ""
        self.log_folder = ""
        self.actors: dict[str, Any] = {}  # worker ids, "router", "relay" → actor handles
        self.progress = progress
        self._name = f"pdspec-{secrets.token_hex(4)}"  # deployments may stand side by side in one namespace
        self._groups: list[PlacementGroup] = []
        self._slots: list[tuple[PlacementGroup, int]] = []  # of each worker, or of its first rank
        self._owns_ray = False
        self._folder = ""

    def start(self) -> None:
        """See ``start_cluster``; on an error the caller must ``stop``."""
        _check_port(self.config.router)
        if self.config.http.port >= 0:
            _check_port(self.config.http, flag="--http-port")
        self.progress("starting Ray" if not self.config.address else "joining the Ray cluster")
        self._join()
        workers = [("prefill", i) for i in range(self.config.prefill)]
        workers += [("decode", i) for i in range(self.config.decode)]
        configs = [self._reachable(self.config.worker_config(role, index)) for role, index in workers]
        self._place(configs)
        self._start_router(configs)
        self._start_http()
        self._start_workers(configs)
        self.progress(f"loading {self.config.worker.model} on {len(configs)} workers")
        self._await_started()
        with RouterClient(self.endpoint, Access.of(self.config.router_config())) as client:
            client.wait_ready(workers=len(configs), timeout_s=self.config.start_timeout_s)

    def process_ids(self) -> dict[str, int]:
        """Process of each actor, by name."""
        return {name: ray.get(actor.process_id.remote(), timeout=10) for name, actor in self.actors.items()}

    def stop(self) -> None:
        """End the actors, and Ray with every process of it where this object started it. Safe to repeat."""
        if ray.is_initialized():
            stopping = [actor.stop.remote() for actor in self.actors.values()]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
            for actor in self.actors.values():
                ray.kill(actor, no_restart=True)
            for group in self._groups:
                remove_placement_group(group)
        self.actors, self._groups, self._slots = {}, [], []
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # ------------------------------------------------------------------ steps of start

    def _join(self) -> None:
        if ray.is_initialized():  # the caller's own cluster
            return
        common: dict[str, Any] = {
            "namespace": self.config.namespace,
            "log_to_driver": False,  # each process writes its own log; what fails is raised here
            "logging_level": "error",
            "runtime_env": _runtime_env(),
        }
        self._owns_ray = True
        if self.config.address:
            try:
                ray.init(address=self.config.address, **common)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
                message = f"cannot join the Ray cluster {self.config.address!r}: {str(error).splitlines()[0]}"
                remedy = "start one with `ray start --head`, or leave address out for an embedded one"
                if isinstance(error, ray.exceptions.AuthenticationError):
                    remedy = "put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN; set RAY_AUTH_MODE=token"
                raise ConfigError(message, field="address", remedy=remedy) from error
            return
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # before ~/.ray/auth_token, which may be stale
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own default, 15, starves them beside anything else
        base = "/tmp" if Path("/tmp").is_dir() else None  # socket paths are limited to about 100 characters
        self._folder = tempfile.mkdtemp(prefix="pdspec-ray-", dir=base)
        self.log_folder = f"{self._folder}/session_latest/logs"
        ray.init(
            include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=self._folder, **common
        )

    def _reachable(self, config: WorkerConfig) -> WorkerConfig:
        """Workers that may be on several nodes listen on their node's address instead of the loopback."""
        joined = bool(self.config.address) or len(_nodes()) > 1
        return config.replace(host="") if joined and config.host == LOOPBACK else config

    def _place(self, configs: Sequence[WorkerConfig]) -> None:
        nodes, ranks = _nodes(), [config.tp for config in configs]
        asked = {"CPU": self.config.cpus_per_worker, "GPU": self.config.gpus_per_worker}
        shares = {name: share([node.get(name, 0) for node in nodes], ranks) for name in asked}

        def bundles(config: WorkerConfig) -> list[dict[str, float]]:
            extra, _ = self.config.pinned(config.role)
            own = {name: asked[name] / config.tp if asked[name] >= 0 else shares[name] for name in asked}
            every = [{**own, **extra}, *[own] * (config.tp - 1)]
            return [{name: amount for name, amount in one.items() if amount} for one in every]

        def group(members: Sequence[WorkerConfig], strategy: str) -> PlacementGroup:
            """Of all bundles of ``members``, each on a node with its role's labels."""
            wanted = [self.config.pinned(one.role)[1] for one in members for _ in range(one.tp)]
            every = [bundle for one in members for bundle in bundles(one)]
            return placement_group(every, strategy=strategy, bundle_label_selector=wanted if any(wanted) else None)

        alone = [config for config in configs if config.tp == 1]
        if alone:
            self._groups = [group(alone, self.config.placement)]
        for config in configs:
            if config.tp > 1:  # its ranks meet on their node's loopback
                self._groups.append(group([config], "STRICT_PACK"))
            self._slots.append((self._groups[0], alone.index(config)) if config.tp == 1 else (self._groups[-1], 0))
        deadline = time.monotonic() + min(self.config.start_timeout_s, 60.0)
        if not all(one.wait(max(0.1, deadline - time.monotonic())) for one in self._groups):
            message = f"no room for {[bundles(one) for one in configs]}: the cluster has {ray.available_resources()}"
            if any(self.config.pinned(one.role)[1] for one in configs):
                message += f", nodes with the labels {[node['Labels'] for node in ray.nodes() if node['Alive']]}"
            raise ConfigError(message, field="placement", remedy="add nodes, or lower gpus_per_worker, cpus_per_worker")

    def _start_router(self, workers: Sequence[WorkerConfig]) -> None:
        here = LOOPBACK if not self.config.address else ray.util.get_node_ip_address()
        relay_host = here if here == LOOPBACK and all(config.host for config in workers) else ""
        relay_host = relay_host or ray.util.get_node_ip_address()
        router = self.config.router_config()
        relay_port = _free_port(relay_host)
        # Fixed ports, so that both are where they were after a restart.
        router = router.replace(port=router.port or _free_port(router.host), relay=f"{relay_host}:{relay_port}")
        metrics_port = router.metrics_port + (router.metrics_port > 0)  # they may listen on the same address
        relay = router.replace(host=relay_host, port=relay_port, metrics_port=metrics_port)
        pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": pinned}
        names = tuple((config.worker_id, config.role, self._actor_name(config.worker_id)) for config in workers)
        named = {"name": self._actor_name("router"), "max_task_retries": -1}  # its methods may be repeated
        self.actors["router"] = ray.remote(RouterActor).options(**options, **named).remote(router, names)
        self.actors["relay"] = ray.remote(RelayActor).options(**options).remote(relay)
        self.endpoint = self._endpoint(router)
        self.relay = router.relay

    def _start_http(self) -> None:
        if self.config.http.port < 0:
            return
        front = self.config.http_config(self.endpoint)
        front = front.replace(port=front.port or _free_port(front.host))
        pinned = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": pinned}
        self.actors["http"] = ray.remote(HttpActor).options(**options).remote(front)
        self.http = f"{self._shown(front.host)}:{front.port}"

    def _start_workers(self, configs: Sequence[WorkerConfig]) -> None:
        for config, (group, index) in zip(configs, self._slots, strict=True):
            bundle = group.bundle_specs[index]
            actor = ray.remote(WorkerActor).options(
                name=self._actor_name(config.worker_id),
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                max_restarts=-1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            )
            every = self.config.worker_roles(config.role, int(config.worker_id.rpartition("-")[2]))
            roles = {role: self._reachable(one) for role, one in every.items()}
            self.actors[config.worker_id] = actor.remote(roles, config.role, self._actor_name("router"))

    def _await_started(self) -> None:
        waiting = {actor.failure.remote(): name for name, actor in self.actors.items()}
        deadline = time.monotonic() + self.config.start_timeout_s
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = ", ".join(waiting.values())
                raise PeerLost(f"not started in {self.config.start_timeout_s:g} s: {late}", field="start_timeout_s")
            name = waiting.pop(done[0])
            try:
                failure = ray.get(done[0])
            except ray.exceptions.RayError as error:
                raise PdspecError(f"{name} died while starting: {_last_line(error)}") from error
            if failure:
                raise error_from_dict(failure)

    def _actor_name(self, worker_id: str) -> str:
        return f"{self._name}-{worker_id}"

    def _endpoint(self, router: RouterConfig) -> str:
        return f"{self._shown(router.host)}:{router.port}"

    def _shown(self, host: str) -> str:
        return ray.util.get_node_ip_address() if host in ("0.0.0.0", "::", "") else host


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _runtime_env() -> dict[str, Any] | None:
    """Actors import the package by name: from a checkout that is not installed they need its path."""
    try:
        metadata.distribution("pdspec")
    except metadata.PackageNotFoundError:
        path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        return {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, path))}}
    return None


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _check_port(router: RouterConfig | HttpConfig, flag: str = "--port") -> None:
    """Refuse a taken port now, not after Ray and the models have started."""
    with socket.socket(socket.AF_INET6 if ":" in router.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((router.host, router.port))
        except OSError as error:
            message = f"cannot listen on {router.host}:{router.port}: {error.strerror}"
            remedy = f"stop what holds the port, or choose another with {flag} (0: any free one)"
            raise ConfigError(message, field="port", remedy=remedy) from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
