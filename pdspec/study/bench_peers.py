"""``pdspec bench peers``: this engine and others over the same weights, prompts and number of tokens, in turns.

Every peer holds the model in its own process, run by its own interpreter, and is idle while another one works. pdspec
answers through router, prefill and decode worker, its client in this process; the peers are called inside theirs.

* **one prompt at a time**: tokens per second after the first token, prompt by prompt in turns.
* **batches**: all prompts of a batch at once; tokens over the time to the last token, prefill included.

Of pdspec both plain decoding and the best speculative setting are shown; settings are tried once before that.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError
from pdspec.model.files import ModelFiles, resolve
from pdspec.model.gguf_export import export
from pdspec.model.store import cache_root
from pdspec.study.heads import worker_config
from pdspec.study.load import Load as Client
from pdspec.study.load import Timed
from pdspec.study.peers.find import KINDS, find
from pdspec.study.peers.process import Load, PeerProcess
from pdspec.study.settings import Setting
from pdspec.study.stack import Stack
from pdspec.study.ways import prompt_ids
from pdspec.telemetry import usable_cores
from pdspec.types import SamplingParams, UserRequest

Progress = Callable[[str], object]
Prompts = Sequence[tuple[int, ...]]
NONE = Setting("none")
SINGLE = (NONE, Setting("ngram", "chain(2)"), Setting("eagle3", "chain(2)"), Setting("eagle3", "dynamic(2,3,5)"),
          Setting("eagle3", "dynamic(3,4,8)"))  # fmt: skip
BATCHED = (NONE, Setting("ngram", "chain(1)"), Setting("ngram", "chain(2)"), Setting("eagle3", "chain(1)"))
LOOKUP = ("transformers",)  # peers whose own prompt lookup is measured, too: it takes one prompt at a time
FLOORS = {"1": {"llama.cpp": 1.1}, "8": {"vllm": 2.0, "transformers": 4.0}, "16": {"vllm": 2.0, "transformers": 4.0}}
_IDLE_S = 0.3  # threads of some peers spin a while after their work


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One measurement: tokens per second, and what was written."""

    rate: float
    answers: tuple[tuple[int, ...], ...]


Measure = Callable[[Prompts, int], Turn]


class Ours:
    """pdspec through its router."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def with_setting(self, setting: Setting) -> Measure:
        """How a setting is measured: a single prompt by its rate after the first token, several by throughput."""

        def measure(prompts: Prompts, max_tokens: int) -> Turn:
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)
            found = self.client.run([
                UserRequest(prompt_ids=ids, drafter=setting.drafter, tree=setting.tree, sampling=params)
                for ids in prompts
            ])  # fmt: skip
            return Turn(rate=_rate(found), answers=tuple(one.token_ids for one in found))

        return measure


def _rate(found: Sequence[Timed]) -> float:
    if len(found) == 1:
        return (len(found[0].token_ids) - 1) / (found[0].done_s - found[0].ttft_s)
    began, ended = min(one.asked for one in found), max(one.times[-1] for one in found)
    return sum(len(one.token_ids) for one in found) / (ended - began)


def _theirs(peer: PeerProcess) -> Measure:
    def measure(prompts: Prompts, max_tokens: int) -> Turn:
        took = peer.generate(prompts, max_tokens)
        return Turn(rate=took.decode_rate if len(prompts) == 1 else took.throughput, answers=took.tokens)

    return measure


def run(
    *, worker: dict[str, Any], given: Mapping[str, str], where: str, only: Sequence[str], drafters: Sequence[str],
    batches: Sequence[int], prompts: str | None, num_prompts: int, max_tokens: int, runs: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``given`` and ``where`` as ``find`` takes them; ``only`` names the peers that count (empty: all that are here),
    ``drafters`` are tried beside ``none``. Raises ConfigError where there is no peer or no drafter."""
    config = worker_config({"budget": "goodput", "drafter": "none", **worker}, drafters)
    if config.dtype != "bfloat16":
        raise ConfigError("peers hold bfloat16 weights", field="dtype", remedy="leave --dtype out")
    if not any(one.drafter in drafters for one in SINGLE[1:]):
        raise ConfigError("no drafter is named", field="drafters", remedy="ngram, eagle3, or both")
    pythons = {name: python for name, python in find(given, where).items() if not only or name in only}
    if not pythons:
        raise ConfigError("no peer is installed", field="--peers", remedy=KINDS["llama.cpp"].remedy)
    ids = prompt_ids(config, prompts, max(num_prompts, *batches))
    result: dict[str, Any] = {}
    with ExitStack() as open_peers:
        peers = _start(open_peers, pythons, config, ids, max(batches), max_tokens, progress)
        with Stack(config, progress=progress) as stack, Client(stack.endpoint) as client:
            ours = Ours(client)
            for size in batches:
                groups = _groups(ids, size, num_prompts)
                settings = [one for one in (SINGLE if size == 1 else BATCHED) if one.drafter in config.drafters]
                measures = _measures(ours, settings, peers, groups, max_tokens, progress)
                result[str(size)] = _compare(measures, groups, size, max_tokens, runs, progress)
        known = {name: peer.settings for name, peer in peers.items()}
    floors = [floor for size, row in result.items() for floor in _floors(size, row)]
    missing = {name: kind.remedy for name, kind in KINDS.items() if name not in pythons}
    return {
        "ok": all(floor["ok"] for floor in floors), "floors": floors, "batch": result, "missing": missing,
        "peers": known, "max_tokens": max_tokens, "runs": runs, "budget": config.budget,
    }  # fmt: skip


def _start(
    stack: ExitStack, pythons: Mapping[str, str], config: WorkerConfig, ids: Prompts, batch: int, max_tokens: int,
    progress: Progress,
) -> dict[str, PeerProcess]:  # fmt: skip
    files = resolve(config.model, config.cache_dir or None)
    if files.path is None:
        raise ConfigError(f"{config.model} has no files for a peer", field="model", remedy="take smollm2-135m")
    context = 32 * -(-(max(map(len, ids)) + max_tokens + 1) // 32)
    peers = {}
    for name, python in pythons.items():
        gguf = str(gguf_of(files, config)) if KINDS[name].gguf else ""
        for mode in ("plain", "lookup") if name in LOOKUP else ("plain",):
            load = Load(
                model=str(files.path), gguf=gguf, threads=config.threads or usable_cores(), batch=batch,
                context=context, mode=mode,
            )  # fmt: skip
            progress(f"starting {name} ({mode})")
            peers[name if mode == "plain" else f"{name} {mode}"] = stack.enter_context(PeerProcess(name, python, load))
    return peers


def gguf_of(files: ModelFiles, config: WorkerConfig) -> Path:
    """The target as one GGUF file in the cache folder, written unless it is there."""
    path = cache_root(config.cache_dir or None) / "gguf" / f"{files.content_hash}-bf16.gguf"
    return path if path.exists() else export(files, path)


def _groups(ids: Prompts, size: int, num_prompts: int) -> list[list[tuple[int, ...]]]:
    if size == 1:
        return [[one] for one in ids[:num_prompts]]
    return [[*ids[at:], *ids[:at]][:size] for at in range(0, len(ids), size)][: max(1, num_prompts // size)]


def _measures(
    ours: Ours, settings: Sequence[Setting], peers: Mapping[str, PeerProcess], groups: Sequence[Prompts],
    max_tokens: int, progress: Progress,
) -> dict[str, Measure]:  # fmt: skip
    """What takes turns: plain decoding, the best speculative setting as one trial finds it, and the peers."""
    tried: dict[Setting, float] = {}
    size = len(groups[0])
    for setting in settings:
        measure = ours.with_setting(setting)
        measure(groups[0], 8)
        tried[setting] = statistics.fmean(measure(group, max_tokens).rate for group in groups[:4])
        progress(f"batch {size}: tried {setting}: {tried[setting]:.1f} tokens/s")
    best = max((setting for setting in tried if setting != NONE), key=lambda setting: tried[setting])
    measures: dict[str, Measure] = {f"pdspec {one}": ours.with_setting(one) for one in (NONE, best)}
    for name, peer in peers.items():
        if size == 1 or not name.endswith(" lookup"):
            measures[name] = _theirs(peer)
            measures[name](groups[0], 8)
    return measures


def _compare(
    measures: Mapping[str, Measure], groups: Sequence[Prompts], size: int, max_tokens: int, runs: int,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    names = list(measures)
    rates: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = defaultdict(dict)
    for index in range(runs):
        seconds: dict[str, float] = defaultdict(float)
        for number, group in enumerate(groups):
            turn = (index + number) % len(names)  # nobody is always the first
            for name in (*names[turn:], *names[:turn]):
                time.sleep(_IDLE_S)
                found = measures[name](group, max_tokens)
                seconds[name] += 1.0 / found.rate
                answers[name].update(zip(group, found.answers, strict=True))
        for name in names:
            rates[name].append(len(groups) / seconds[name])
        progress(f"batch {size}, run {index + 1}: " + ", ".join(f"{name} {rates[name][-1]:.1f}" for name in names))
    own = [name for name in names if name.startswith("pdspec ")]
    best = max(own, key=lambda name: statistics.median(rates[name]))
    table = {
        name: {
            "tokens_per_second": statistics.median(rates[name]), "runs": rates[name],
            "ratio_of_best": statistics.median(a / b for a, b in zip(rates[best], rates[name], strict=True)),
            "same_beginning": _same_beginning(answers[own[0]], answers[name]),
        }
        for name in names
    }  # fmt: skip
    return {"best": best, "engines": table, "prompts": sum(map(len, groups))}


def _same_beginning(ours: Mapping[tuple[int, ...], tuple[int, ...]], theirs: Mapping[tuple[int, ...], Any]) -> float:
    """Share of prompts whose first 16 greedy tokens are ours: the same weights, other kernels."""
    return statistics.fmean(ours[ids][:16] == tuple(theirs[ids][:16]) for ids in ours)


def _floors(size: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of a batch size against the peers that were there."""
    return [
        {"batch": int(size), "peer": name, "wanted": wanted, "ratio": row["engines"][name]["ratio_of_best"],
         "ok": row["engines"][name]["ratio_of_best"] >= wanted}
        for name, wanted in FLOORS.get(size, {}).items() if name in row["engines"]
    ]  # fmt: skip
