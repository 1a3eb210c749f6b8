"""``pdspec bench handoff``: what a handoff adds to a prefill, and what it costs the decode worker's running answers.

* **exposed**: from the last layer computed on the prefill worker to Done on the decode worker; the layers before have
  travelled while later ones were computed. Beside it 2 × (last layer's bytes ÷ the path's measured rate) + 5 ms.
* **throttled**: the same on a link that takes half as long as the prefill for the whole prompt; exposed ÷ transfer.
* **cpu**: seconds of every process for one handoff, without the prefill beside it.
* **step**: a decode step while a handoff lands in a prefill's rhythm, against a quiet one in turns.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.model.files import resolve
from pdspec.study.bench_stream import PATHS, measure, receiver
from pdspec.study.decode_steps import steps_beside_handoffs
from pdspec.study.stack import Stack
from pdspec.types import CacheGroup, SamplingParams, UserRequest

Progress = Callable[[str], object]
ANSWER = 2  # tokens: with one alone, no KV would move
ALLOWED_MS, ALLOWED_SHARE, ALLOWED_STEP = 5.0, 0.1, 1.1
LINK_SHARE = 0.5  # of the prefill, for the transfer over the throttled link


class Handoffs:
    """Asks for prompts of given lengths over every path; ``by_path`` are the routers' clients."""

    def __init__(self, by_path: dict[str, RouterClient], drafter: str, vocab_size: int) -> None:
        self.by_path, self.drafter, self.vocab_size = by_path, drafter, vocab_size

    def one(self, path: str, length: int, salt: int) -> dict[str, float]:
        """Exposed and prefill milliseconds and KV bytes of one prompt."""
        ids = tuple((7 * i * i + 31 * salt + i) % self.vocab_size for i in range(length))
        answer = self.by_path[path].generate(UserRequest(
            prompt_ids=ids, drafter=self.drafter, handoff="relay" if path == "relay" else "direct",
            sampling=SamplingParams(max_tokens=ANSWER, ignore_eos=True, seed=0),
        ))  # fmt: skip
        stats = answer.stats
        return {
            "exposed_ms": stats.transfer_exposed_ms, "prefill_ms": stats.prefill_ms,
            "bytes": float(stats.kv_bytes + stats.draft_kv_bytes),
        }  # fmt: skip

    def all(self, lengths: Sequence[int], runs: int, progress: Progress) -> dict[int, dict[str, list[dict]]]:
        """``runs`` of each length over each path, in turns, after one that warms up."""
        found: dict[int, dict[str, list[dict]]] = {length: defaultdict(list) for length in lengths}
        for path in self.by_path:
            self.one(path, min(lengths), 0)
        for length in lengths:
            for index in range(runs):
                for path in self.by_path:
                    found[length][path].append(self.one(path, length, index))
            progress(f"handoffs of {length} tokens")
        return found


@contextmanager
def stacks(config: WorkerConfig, progress: Progress, **prefill: Any) -> Iterator[dict[str, RouterClient]]:
    """A client for each path: shared memory has decode workers of its own, which demand it."""
    with ExitStack() as stack:
        clients = {}
        for mover in ("grpc", "shm"):
            running = stack.enter_context(
                Stack(config.replace(mover="auto"), prefill_changes=prefill, decode_changes={"mover": mover},
                      progress=progress))  # fmt: skip
            clients[mover] = stack.enter_context(RouterClient(running.endpoint))
        yield {"grpc": clients["grpc"], "relay": clients["grpc"], "shm": clients["shm"]}


def run(*, worker: dict[str, Any], lengths: Sequence[int], runs: int, progress: Progress) -> dict[str, Any]:
    """The whole benchmark. Raises ConfigError for settings that cannot work."""
    alone = {"drafter": "none", "drafters": ("none",), "prefix_cache": "off"}
    config = WorkerConfig.from_mapping({**alone, **worker})
    model = resolve(config.model, config.cache_dir or None).config
    lengths = sorted({min(length, model.max_context - ANSWER) for length in lengths})
    middle = min(lengths, key=lambda length: abs(length - 2048))
    group = model.cache_group("target", config.dtype)
    with receiver(config, middle) as here:
        rates = measure(here, 64 << 20, runs)
    with stacks(config, progress) as by_path:
        measured = Handoffs(by_path, config.drafter, model.vocab_size).all(lengths, runs, progress)
    speeds = {path: rates[path]["handoff"]["bytes_per_second"] for path in PATHS}
    result: dict[str, Any] = {
        "rates_bytes_per_second": speeds,
        "exposed": {str(n): _exposed(n, config.chunk, group, found, speeds) for n, found in measured.items()},
        "cpu": _cpu(rates, middle, group),
    }
    prefill_ms = statistics.median(row["prefill_ms"] for rows in measured[middle].values() for row in rows)
    size = measured[middle]["grpc"][0]["bytes"]
    limit = size / (LINK_SHARE * prefill_ms / 1e3)
    with stacks(config, progress, link_limit=limit) as by_path:
        slow = Handoffs(by_path, config.drafter, model.vocab_size).all([middle], runs, progress)[middle]
    result["throttled"] = _throttled(middle, limit, size, slow)
    result["step"] = _steps(config, middle, prefill_ms / 1e3, runs, progress)
    return result


def _exposed(
    length: int, chunk: int, group: CacheGroup, found: dict[str, list[dict]], speeds: dict[str, float]
) -> dict[str, Any]:
    last_bytes = ((length - 1) % chunk + 1) * group.row_bytes
    table = {}
    for path, rows in found.items():
        floor = 1e3 * last_bytes / speeds[path]
        exposed = statistics.median(row["exposed_ms"] for row in rows)
        allowed = 2 * floor + ALLOWED_MS
        table[path] = {
            "exposed_ms": exposed, "runs": [row["exposed_ms"] for row in rows], "floor_ms": floor,
            "allowed_ms": allowed, "of_allowed": exposed / allowed,
            "prefill_ms": statistics.median(row["prefill_ms"] for row in rows), "bytes": rows[0]["bytes"],
            "last_layer_bytes": last_bytes,
        }  # fmt: skip
    return table


def _cpu(rates: dict[str, Any], tokens: int, group: CacheGroup) -> dict[str, Any]:
    copied = tokens * group.num_layers * group.row_bytes
    rows = {path: {"seconds": rates[path]["handoff"]["cpu_seconds"], **rates[path]["handoff"]["cpu_seconds_of"]}
            for path in PATHS}  # fmt: skip
    return {"tokens": tokens, "bytes": copied, "paths": rows}


def _throttled(length: int, limit: float, size: float, slow: dict[str, list[dict]]) -> dict[str, Any]:
    transfer_ms = 1e3 * size / limit
    paths = {}
    for path, rows in slow.items():
        exposed = statistics.median(row["exposed_ms"] for row in rows)
        paths[path] = {
            "exposed_ms": exposed, "of_transfer": exposed / transfer_ms, "allowed": ALLOWED_SHARE,
            "prefill_ms": statistics.median(row["prefill_ms"] for row in rows),
        }  # fmt: skip
    return {"tokens": length, "link_bytes_per_second": limit, "transfer_ms": transfer_ms, "paths": paths}


def _steps(config: WorkerConfig, tokens: int, seconds: float, runs: int, progress: Progress) -> dict[str, Any]:
    table: dict[str, Any] = {"tokens": tokens, "handoff_seconds": seconds, "allowed": ALLOWED_STEP}
    for mover in ("grpc", "shm"):
        began = time.perf_counter()
        quiet, busy = steps_beside_handoffs(config.replace(mover=mover), tokens, seconds, runs)
        table[mover] = {
            "quiet_ms": statistics.median(quiet), "landing_ms": statistics.median(busy),
            "ratio": statistics.median(busy) / statistics.median(quiet),
            "mean_ratio": statistics.mean(busy) / statistics.mean(quiet), "steps": [len(quiet), len(busy)],
        }  # fmt: skip
        progress(f"decode steps beside handoffs ({mover}): {time.perf_counter() - began:.0f} s")
    return table
