"""The settings of workers, router and cluster: frozen, keyword-only, checked when made (``settings.py``).

Every field is a key of a config file and a flag (``cache_dir`` is ``--cache-dir``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pdspec.errors import ConfigError
from pdspec.settings import Settings, option, unknown_name
from pdspec.tls import TlsConfig, check_members, make_absolute, whole_path

ROLES = ("prefill", "decode")
DTYPES = ("bfloat16", "float32")
NUMERICS = ("auto", "exact", "fast")
HANDOFFS = ("direct", "relay")
MOVERS = ("auto", "grpc", "shm")
WIRE_KVS = ("whole", "int8")
SURVIVALS = ("auto", "online", "fixed", "q")
BUDGETS = ("fixed", "goodput")
PREFILL_CHOICES = ("remote", "measured")
PREFIX_CACHES = ("auto", "all", "prompt", "off")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerConfig(Settings):
    """One prefill or decode worker."""

    role: str = option("decode", "what the worker does", choices=ROLES)
    model: str = option("smollm2-135m", "alias, hub id or folder of the target model")
    dtype: str = option("bfloat16", "type of weights and KV", choices=DTYPES)
    numerics: str = option(
        "auto", "exact: a row's bits depend on its token prefix alone; auto: exact where the self-test proves it",
        choices=NUMERICS,
    )  # fmt: skip
    drafter: str = option("eagle3", "drafter of requests that name none")
    drafters: tuple[str, ...] = option(("none", "ngram", "suffix", "eagle3"), "drafters to hold ready")
    plugins: tuple[str, ...] = option((), "files or modules of draft families beside pdspec's own")
    heads: dict[str, str] = option({}, "draft head folders by drafter name; others use the shipped head")
    options: dict[str, str] = option({}, "options of draft families by FAMILY:OPTION; see pdspec drafters")
    tree: str = option("", "draft tree of requests that name none, e.g. chain(4) or dynamic(4,4,8)")
    trees: dict[str, str] = option({}, "JSON files of static shapes by the name that static(NAME) then has")
    survival: str = option(
        "auto", "a draft node's chance: online, fitted on what this worker verifies; fixed, so that drafts depend on"
        " the request alone; q, the drafter's own score; auto: online under budget goodput, else fixed",
        choices=SURVIVALS,
    )  # fmt: skip
    budget: str = option(
        "fixed", "what is drafted: fixed, the request's tree; goodput, the part of it that raises tokens per second",
        choices=BUDGETS,
    )  # fmt: skip
    draft_queue: int = option(
        1024, "plain steps of a sequence that its drafter may be behind under budget goodput; past that it stays plain",
        low=1,
    )  # fmt: skip
    draft_prefill: str = option("prefill", "who runs the drafter over the prompt", choices=ROLES)
    mover: str = option(
        "auto", "what carries KV of direct handoffs; auto: shared memory where both workers have one /dev/shm",
        choices=MOVERS,
    )  # fmt: skip
    wire_kv: str = option(
        "whole", "target KV of handoffs: whole, as it was computed; int8, LOSSY: rounded per head and 16 tokens, half"
        " of bfloat16's bytes, and answers may differ from the model's", choices=WIRE_KVS,
    )  # fmt: skip
    link_limit: float = option(0.0, "bytes per second of KV that a prefill worker sends at most; 0: no limit", low=0)
    host: str = option("127.0.0.1", "address to listen on and to be reached at")
    port: int = option(0, "0: any free port", low=0, high=65535)
    worker_id: str = option("", "name in logs and statistics; empty: made from role and address")
    page_size: int = option(16, "tokens of one KV page", low=1, high=4096)
    num_pages: int = option(0, "KV pages; 0: from cache_tokens", low=0)
    cache_tokens: int = option(65536, "tokens that the KV cache holds", low=1)
    prefix_cache: str = option(
        "auto", "which KV of earlier requests serves those that begin alike: all; prompt, what prefills computed; off;"
        " auto: all where numerics are exact, else prompt", choices=PREFIX_CACHES,
    )  # fmt: skip
    local_prefill: int = option(
        0, "a decode worker computes a prompt itself when no more tokens of it than that are missing", low=0
    )
    max_batch: int = option(64, "sequences that run at once", low=1)
    chunk: int = option(512, "prompt tokens of one prefill step", low=1)
    threads: int = option(0, "CPU threads; 0: all cores", low=0)
    tp: int = option(1, "ranks that share the target's layers out among them (tensor parallelism)", low=1, high=64)
    reserve_headroom: int = option(512, "tokens reserved beyond the prompt before a prefill is asked for", low=0)
    kv_overcommit: float = option(
        2.0, "times the KV pool that running answers may need in all; above 1 they begin with reserve_headroom and"
        " grow, and where pages run out the cheapest is retracted", low=1,
    )  # fmt: skip
    kv_watermark: float = option(0.01, "share of the KV pages left free when an answer is admitted", low=0, high=0.9)
    retract_memory: int = option(
        1 << 30, "bytes of host memory for retracted KV; beyond it rows are computed anew", low=0
    )  # fmt: skip
    stream_buffer: int = option(256, "messages that may wait for an answer's reader before the answer pauses", low=1)
    drain_s: float = option(20.0, "answers under way may end for so long when it drains; then they move", low=0)
    stall_timeout_s: float = option(5.0, "a peer that makes no progress for so long is cut", low=0.05)
    handoff_timeout_s: float = option(600.0, "for a whole handoff, however busy the peer says it is", low=0.05)
    strict_target: bool = option(False, "refuse a head trained on other weights of the same geometry")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    cache_dir: str = option("", "folder of converted models; empty: PDSPEC_CACHE or ~/.cache/pdspec")
    on_prefill_failure: str = option("retry", "when a prefill worker fails", choices=("retry", "local", "fail"))
    tls: TlsConfig = dataclasses.field(default_factory=TlsConfig)
    cluster_token_file: str = option("", "file of tokens that members of the cluster show to each other")
    log_level: str = option("info", "least level written to stderr", choices=LOG_LEVELS)
    log_format: str = option("text", "of what is written to stderr", choices=LOG_FORMATS)
    metrics_port: int = option(-1, "Prometheus metrics over HTTP; 0: any free port, -1: none", low=-1, high=65535)
    traces: str = option("", "where spans go: otlp, console, or MODULE:CLASS of an exporter; empty: nowhere")
    frame_faults: dict[str, float] = option({}, "a prefill worker damages its frames, chance by kind (for tests)")
    poison: bool = option(False, "fill erased KV rows with NaN (a debug aid)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device not in ("auto", "cpu", "cuda") and not (
            self.device.startswith("cuda:") and self.device[5:].isdecimal()
        ):
            raise ConfigError(f"unknown device {self.device!r}", field="device", remedy="auto, cpu, cuda or cuda:N")
        if self.drafter not in self.drafters:
            raise unknown_name("drafter", self.drafter, self.drafters, field="drafter", where="drafters")
        if self.lossy_wire and self.numerics == "exact":
            message = f"wire_kv {self.wire_kv} is lossy: rows behind a handoff lose the bits that numerics exact means"
            raise ConfigError(message, field="wire_kv", remedy="use wire_kv whole, or numerics fast")
        check_members(self.tls)
        make_absolute(self, "cluster_token_file")
        plugins = tuple(whole_path(one) if one.endswith(".py") else one for one in self.plugins)
        object.__setattr__(self, "plugins", plugins)
        for name in self.heads:
            if name not in self.drafters:
                raise unknown_name("drafter", name, self.drafters, field="heads", where="drafters")

    def survival_mode(self) -> str:
        """online, fixed or q."""
        if self.survival == "auto":
            return "online" if self.budget == "goodput" else "fixed"
        return self.survival

    @property
    def lossy_wire(self) -> bool:
        """Whether handoffs change the target KV."""
        return self.wire_kv != "whole"

    def pages(self) -> int:
        """Size of the page pool."""
        return self.num_pages or -(-self.cache_tokens // self.page_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig(Settings):
    """The token router, and the relay that stands beside it."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(50051, "0: any free port", low=0, high=65535)
    prefill: tuple[str, ...] = option((), "addresses of the prefill workers; none: decode workers prefill")
    decode: tuple[str, ...] = option((), "addresses of the decode workers")
    handoff: str = option("direct", "path of KV for requests that name none", choices=HANDOFFS)
    relay: str = option("", "address of the relay")
    model: str = option("smollm2-135m", "alias, hub id or folder: its tokenizer is used")
    cache_dir: str = option("", "folder of converted models; empty: PDSPEC_CACHE or ~/.cache/pdspec")
    max_message_bytes: int = option(4 << 20, "largest request taken", low=1024)
    heartbeat_s: float = option(0.2, "interval of the questions to the workers", low=0.05, high=60)
    lost_after_s: float = option(0.7, "a worker that leaves one unanswered for so long is lost", low=0.05, high=60)
    cache_weight: float = option(
        4.0, "requests of load that a worker whose cache has a whole prompt may have more than others; 0: never", low=0
    )
    prefill_choice: str = option(
        "remote", "who computes a prompt where there are prefill workers: remote, they do; measured, the decode worker"
        " where its measured times, waits of its running answers counted, promise less", choices=PREFILL_CHOICES,
    )  # fmt: skip
    drain_s: float = option(20.0, "streams under way may end for so long when it is told to end", low=0)
    stall_s: float = option(5.0, "a worker that has work and makes no step for so long is lost", low=0.1)
    failover_wait_s: float = option(15.0, "an answer waits so long for a worker to come back", low=0)
    max_replays: int = option(16, "times that one answer may move to another worker", low=0)
    admission: bool = option(True, "requests wait for room and are refused where they would come too late")
    max_queue: int = option(256, "requests that may wait for a place", low=0)
    max_queue_s: float = option(60.0, "a request that would wait longer for a place is refused", low=0)
    quarantine_after: int = option(3, "workers that may die under a request that makes no progress", low=1)
    tls: TlsConfig = dataclasses.field(default_factory=TlsConfig)
    cluster_token_file: str = option("", "file of tokens that members of the cluster show to each other")
    token_file: str = option("", "file of users' tokens; empty: nobody is asked for one")
    client_rate: float = option(0.0, "requests per second of one user (token, or host); 0: any number", low=0)
    request_timeout_s: float = option(10.0, "to send a request whole once its call is open", low=0.05)
    log_level: str = option("info", "least level written to stderr", choices=LOG_LEVELS)
    log_format: str = option("text", "of what is written to stderr", choices=LOG_FORMATS)
    metrics_port: int = option(-1, "Prometheus metrics over HTTP; 0: any free port, -1: none", low=-1, high=65535)
    traces: str = option("", "where spans go: otlp, console, or MODULE:CLASS of an exporter; empty: nowhere")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_members(self.tls)
        make_absolute(self, "cluster_token_file", "token_file")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpConfig(Settings):
    """OpenAI's API over HTTP, in front of a router."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "0: any free port; -1: none (in a cluster's settings)", low=-1, high=65535)
    router: str = option("127.0.0.1:50051", "the router's host:port")
    cert: str = option("", "certificate chain of HTTPS (PEM); empty: HTTP")
    key: str = option("", "private key of cert")
    tls: TlsConfig = dataclasses.field(default_factory=TlsConfig)
    max_tokens: int = option(1024, "of chats that name none; lowered to what the context leaves", low=1)
    max_body_bytes: int = option(4 << 20, "largest request taken", low=1024)
    drain_s: float = option(20.0, "answers under way may end for so long when it is told to end", low=0)
    log_level: str = option("info", "least level written to stderr", choices=LOG_LEVELS)
    log_format: str = option("text", "of what is written to stderr", choices=LOG_FORMATS)
    metrics_port: int = option(-1, "Prometheus metrics over HTTP; 0: any free port, -1: none", low=-1, high=65535)

    def __post_init__(self) -> None:
        super().__post_init__()
        make_absolute(self, "cert", "key")
        if bool(self.cert) != bool(self.key):
            missing = "key" if self.cert else "cert"
            raise ConfigError("a certificate and its key belong together", field=missing, remedy=f"give {missing}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig(Settings):
    """A whole deployment under Ray: ``prefill`` and ``decode`` workers, one router and its relay.

    ``worker`` holds for both roles; ``prefill_worker`` and ``decode_worker`` change single keys of it.
    """

    prefill: int = option(1, "prefill workers; 0: decode workers prefill, too (colocated)", low=0)
    decode: int = option(1, "decode workers", low=1)
    address: str = option("", "Ray cluster to join: auto or host:port; empty: an embedded one on this machine")
    namespace: str = option("pdspec", "Ray namespace of the actors")
    placement: str = option("SPREAD", "of the workers over nodes", choices=("SPREAD", "PACK", "STRICT_SPREAD"))
    gpus_per_worker: float = option(-1.0, "-1: shared out evenly, 0: none; fractions are allowed", low=-1)
    cpus_per_worker: float = option(-1.0, "-1: shared out evenly; for placement only", low=-1)
    prefill_resources: dict[str, float] = option({}, "Ray resources that pin prefill workers to nodes")
    decode_resources: dict[str, float] = option({}, "Ray resources that pin decode workers to nodes")
    prefill_labels: dict[str, str] = option({}, "labels of the Ray nodes that prefill workers may stand on")
    decode_labels: dict[str, str] = option({}, "labels of the Ray nodes that decode workers may stand on")
    start_timeout_s: float = option(300.0, "to place and start every worker", low=1)
    tls: TlsConfig = dataclasses.field(default_factory=TlsConfig)
    cluster_token_file: str = option("", "file of tokens that members of the cluster show to each other")
    worker: WorkerConfig = dataclasses.field(default_factory=WorkerConfig)
    prefill_worker: dict[str, Any] = dataclasses.field(default_factory=dict)
    decode_worker: dict[str, Any] = dataclasses.field(default_factory=dict)
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    http: HttpConfig = dataclasses.field(default_factory=lambda: HttpConfig(port=-1))

    def __post_init__(self) -> None:
        super().__post_init__()
        make_absolute(self, "cluster_token_file")

    def worker_config(self, role: str, index: int, *, now: str = "") -> WorkerConfig:
        """The config of the ``index``-th worker of ``role``, its changed keys applied; ``now`` is what that worker does
        after a switch of its role."""
        serving = now or role
        changes = self.prefill_worker if serving == "prefill" else self.decode_worker
        values = {**self.worker.to_mapping(), **self._shared(self.worker), **self._numerics(), **changes}
        return WorkerConfig.from_mapping({**values, "role": serving, "worker_id": f"{role}-{index}"})

    def worker_roles(self, role: str, index: int) -> dict[str, WorkerConfig]:
        """That worker's config in each role that it may have: ranks have their places, and keep their role."""
        every = {now: self.worker_config(role, index, now=now) for now in ROLES}
        return every if all(config.tp == 1 for config in every.values()) else {role: every[role]}

    def pinned(self, role: str) -> tuple[dict[str, float], dict[str, str]]:
        """Resources and labels that a node must have for a worker of ``role``."""
        if role == "prefill":
            return self.prefill_resources, self.prefill_labels
        return self.decode_resources, self.decode_labels

    def _numerics(self) -> dict[str, str]:
        """Both sides of a handoff must compute alike: where one has several ranks, which cannot be exact, ``auto`` is
        ``fast`` on all."""
        roles = self.prefill_worker, self.decode_worker
        changed = [WorkerConfig.from_mapping({"tp": part["tp"]}) for part in roles if "tp" in part]
        several = any(one.tp > 1 for one in (self.worker, *changed))
        return {"numerics": "fast"} if several and self.worker.numerics == "auto" else {}

    def router_config(self) -> RouterConfig:
        """The router's config: its model and cache folder are the workers'."""
        known = self.router.replace(**self._shared(self.router))
        return known.replace(model=self.worker.model, cache_dir=self.worker.cache_dir)

    def http_config(self, router: str) -> HttpConfig:
        """Of the HTTP front of the router at ``router``; its port is -1 where there is to be none."""
        tls = self.http.tls if self.http.tls != TlsConfig() else self.router_config().tls
        return self.http.replace(router=router, tls=tls)

    def _shared(self, section: WorkerConfig | RouterConfig) -> dict[str, Any]:
        """What a section takes from the top where it says nothing itself."""
        tls = section.tls if section.tls != TlsConfig() else self.tls
        return {"tls": tls, "cluster_token_file": section.cluster_token_file or self.cluster_token_file}
