"""What one engine process holds: model, KV pages, drafters, and the fingerprints of all three."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import PagePool
from pdspec.config import WorkerConfig
from pdspec.engine.selftest import check_exact
from pdspec.errors import Incompatible, UnknownName
from pdspec.grammar import Grammars
from pdspec.model.build import kernel_hash
from pdspec.model.files import ModelFiles, resolve
from pdspec.model.fingerprint import content_fingerprint
from pdspec.model.loader import load_weights
from pdspec.model.ops import Ops, make_ops
from pdspec.model.runner import Runner
from pdspec.model.tokenizer import load_tokenizer
from pdspec.parallel.ranks import RankProcess, Ranks, StartRank
from pdspec.spec.family import Parts, Setting
from pdspec.spec.protocol import Drafter
from pdspec.spec.registry import draft_groups, make_drafter
from pdspec.spec.tree import TreeSpec, parse_tree, read_shapes, spelled_out
from pdspec.transfer.lossy import FORMAT

log = logging.getLogger(__name__)
WIRE_KV = "wire_kv"  # in the fingerprint where handoffs are lossy


@dataclass(kw_only=True)
class Resources:
    """Built by ``load``; used by the engine thread alone, but for the fields that never change."""

    config: WorkerConfig
    files: ModelFiles
    ops: Ops
    runner: Runner
    cache: PagedCache
    pool: PagePool
    drafters: dict[str, Drafter]
    fingerprint: dict[str, str]
    grammars: Grammars
    metrics: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)  # of config.trees, spelled out
    ranks: Ranks | None = None  # the others, where the target is shared out

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The model's end tokens."""
        return self.files.config.eos_ids

    @property
    def digest(self) -> str:
        """One hash of what all workers of a deployment share; drafters are compared per request."""
        shared = {key: value for key, value in self.fingerprint.items() if not key.startswith("drafter/")}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:32]

    def drafter(self, name: str) -> Drafter:
        """The drafter a request names, or the default. Raises UnknownName."""
        name = name or self.config.drafter
        if name not in self.drafters:
            raise UnknownName(
                f"no drafter {name!r} here", field="drafter", remedy=f"use one of {', '.join(self.drafters)}"
            )
        return self.drafters[name]

    def tree(self, drafter: Drafter, asked: str) -> str:
        """The tree specification of a request: its own, the deployment's for its default drafter, or the family's."""
        default = self.config.tree if drafter.name == self.config.drafter else ""
        return spelled_out(asked or default or drafter.default_tree, self.shapes) if drafter.default_tree else ""

    def alive(self) -> bool:
        """Whether every other rank lives; False is final. Safe on any thread."""
        return self.ranks is None or self.ranks.alive()

    def close(self) -> None:
        """Give threads back, and end other ranks."""
        if self.ranks is not None:
            self.ranks.close()
        self.ops.close()


def tree_spec(tree: str) -> TreeSpec | None:
    """Parsed tree, None for families that draft nothing."""
    return parse_tree(tree) if tree else None


def load(config: WorkerConfig, start: StartRank = RankProcess) -> Resources:
    """Everything a worker needs, or a ConfigError that says what is wrong with the settings or the files. ``start``
    starts the other ranks of a worker that has several."""
    files = resolve(config.model, config.cache_dir or None)
    if config.tp == 1:
        return _load(config, files, None)
    ranks = Ranks(config, files.config, start)
    try:
        return _load(config, files, ranks)
    except BaseException:
        ranks.close()
        raise


def _load(config: WorkerConfig, files: ModelFiles, ranks: Ranks | None) -> Resources:
    shapes = read_shapes(config.trees)
    if config.tree:
        parse_tree(spelled_out(config.tree, shapes))
    ops = ranks.ops() if ranks else make_ops(config.device, config.threads)
    weights, whole = load_weights(files, config.dtype), files.config
    runner = ranks.runner(weights, ops) if ranks else Runner(whole, weights, ops=ops, dtype=config.dtype)
    setting = Setting(
        target=files, dtype=config.dtype, heads=config.heads, strict=config.strict_target, cache_dir=config.cache_dir,
        options=config.options, survival=config.survival_mode(), plugins=config.plugins,
    )
    drafts = draft_groups(config.drafters, setting)
    groups = (runner.group, *drafts)
    cache = ranks.cache(groups, ops.device) if ranks else PagedCache(
        groups, config.pages(), config.page_size, ops.device
    )
    parts = Parts(ops=ops, cache=cache, runner=runner)
    drafters = {name: make_drafter(name, setting, parts) for name in config.drafters}
    resources = Resources(
        config=config,
        files=files,
        ops=ops,
        runner=runner,
        cache=cache,
        drafters=drafters,
        pool=PagePool(config.pages(), config.page_size),
        fingerprint={},
        grammars=Grammars(
            lambda: load_tokenizer(files).to_json(), vocab_size=files.config.vocab_size, end_ids=files.config.eos_ids
        ),
        shapes=shapes,
        ranks=ranks,
    )
    asked = _numerics(config)
    numerics = check_exact(resources, asked) if ranks is None else "fast"
    resources.fingerprint.update(_fingerprint(resources, numerics))
    for name, drafter in drafters.items():
        resources.metrics[f"head_matches_target_{name}"] = float(getattr(drafter, "target_matches", True))
    resources.metrics.update(
        native_kernels=float(ops.name == "native"), numerics_exact=float(numerics != "fast"), tp=float(config.tp),
        wire_kv_lossy=float(config.lossy_wire),
    )  # fmt: skip
    return resources


def _numerics(config: WorkerConfig) -> str:
    """What is asked for; where handoffs are lossy nothing is exact (said once)."""
    if not config.lossy_wire:
        return config.numerics
    log.warning("LOSSY: wire_kv %s rounds the prompt's KV; answers may differ from the model's", config.wire_kv)
    return "fast"


def _fingerprint(resources: Resources, numerics: str) -> dict[str, str]:
    files, config = resources.files, resources.config
    target = content_fingerprint(files.config, files.content_hash, config.dtype, (resources.runner.group,))
    return {
        "target": target,
        "tokenizer": files.tokenizer_hash,
        "numerics": f"exact/{kernel_hash()}" if numerics == "exact" else "fast",
        **({WIRE_KV: FORMAT} if config.lossy_wire else {}),
        **{f"drafter/{name}": drafter.fingerprint() for name, drafter in resources.drafters.items()},
    }


def check_fingerprint(mine: dict[str, str], theirs: dict[str, str], *, drafter: str, peer: str) -> None:
    """Raises Incompatible naming the first field in which two sides of a handoff differ; only the request's own
    drafter is compared."""
    for name in ("target", "tokenizer", WIRE_KV, "numerics", f"drafter/{drafter}"):
        a, b = mine.get(name, "absent"), theirs.get(name, "absent")
        if a != b:
            raise Incompatible(
                f"this worker has {a[:24]}, {peer} has {b[:24]}",
                field=f"fingerprint.{name}",
                remedy="deploy both with the same model, dtype, numerics, wire_kv and heads",
            )
