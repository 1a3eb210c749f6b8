"""``pdspec bench decode``: tokens per second and acceptance length through router, prefill and decode worker.

Everything that is compared is measured in turns within one run, prompt by prompt, so that a drifting machine hits all
alike; medians over the runs count. Each drafter is first tried at every setting within the node budget.

``suffix`` drafts from earlier answers, and here every answer is asked for many times: its row shows what repeated
requests gain. ``first_time`` in it is the first setting tried, when suffix had answered none of these prompts.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from pdspec.client import Answer, RouterClient
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError, InvalidRequest, PdspecError
from pdspec.repetition import repeated_share
from pdspec.study.bench_sampled import against_greedy, twins
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.machine import read_bandwidth, weight_bytes
from pdspec.study.settings import Setting, settings_of
from pdspec.study.stack import Stack
from pdspec.study.transformers_peer import TransformersPeer
from pdspec.study.ways import REMEMBERING, prompt_ids
from pdspec.telemetry import usable_cores
from pdspec.types import GenerateRequest, SamplingParams, UserRequest

Progress = Callable[[str], object]
PREFILL_LENGTHS = (128, 512, 1024, 2040)  # 2048 with its answer would be beyond small models' context
TTFT_TOKENS = 512


class Bench:
    """One stack, one client, and the prompts as token ids."""

    def __init__(self, client: RouterClient, prompts: Sequence[tuple[int, ...]], max_tokens: int, handoff: str) -> None:
        self.client, self.prompts, self.max_tokens, self.handoff = client, prompts, max_tokens, handoff

    def ask(self, setting: Setting, ids: tuple[int, ...], max_tokens: int) -> Answer:
        """One answer of exactly ``max_tokens`` tokens."""
        params = SamplingParams(
            temperature=setting.temperature, top_p=setting.top_p, max_tokens=max_tokens, ignore_eos=True, seed=0
        )
        return self.client.generate(UserRequest(
            prompt_ids=ids, drafter=setting.drafter, tree=setting.tree, handoff=self.handoff, sampling=params,
        ))  # fmt: skip

    def run(self, setting: Setting) -> dict[str, Any]:
        """All prompts once: decode tokens per second, output tokens per verification, answers."""
        return self.summary([self.ask(setting, ids, self.max_tokens) for ids in self.prompts])

    def summary(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Rates over some answers."""
        tokens = sum(len(answer.token_ids) - 1 for answer in answers)
        seconds = sum(answer.total_ms - answer.ttft_ms for answer in answers) / 1e3
        verifications = sum(answer.stats.verifications for answer in answers)
        return {
            "tokens_per_second": tokens / seconds, "acceptance_length": tokens / verifications,
            "ms_per_verification": 1e3 * seconds / verifications, "answers": [answer.token_ids for answer in answers],
        }  # fmt: skip


def run(
    *, drafters: Sequence[str], vs_transformers: bool, worker: dict[str, Any], handoff: str, prompts: str | None,
    num_prompts: int, max_tokens: int, nodes: int, runs: int, progress: Progress, temperature: float = 0.0,
    top_p: float = 1.0, wanted_speedup: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark. Families without a head draft with a random one (``random_heads``). With a ``temperature``
    each family's best setting is measured sampled, too. ``ok``: some family is ``wanted_speedup`` times as fast as
    plain decoding. Raises ConfigError for settings that cannot work."""
    config, random_heads = with_random_heads(worker_config({"drafter": drafters[-1], **worker}, drafters))
    ids = prompt_ids(config, prompts, num_prompts)
    threads = config.threads or usable_cores()
    peer = TransformersPeer(config.model, config.dtype, threads, config.cache_dir or None) if vs_transformers else None
    with Stack(config, progress=progress) as stack, RouterClient(stack.endpoint) as client:
        bench = Bench(client, ids, max_tokens, handoff)
        tried, refused = _tried(bench, drafters, nodes)
        for setting, result in tried.items():
            rate, length = result["tokens_per_second"], result["acceptance_length"]
            progress(f"tried {setting}: {rate:.1f} tokens/s, {length:.2f} per verification")
        best = {
            name: max((s for s in tried if s.drafter == name), key=lambda s: tried[s]["tokens_per_second"])
            for name in drafters
        }
        sampled = twins(best, temperature, top_p)
        measured, peer_rates = _interleaved(bench, [*best.values(), *sampled.values()], peer, runs, progress)
        result = _summary(tried, best, {setting: measured[setting] for setting in best.values()}, nodes)
        if sampled:
            result["sampled"] = against_greedy(measured, best, sampled)
        fastest = max(row["speedup_over_none"] or 0.0 for row in result["drafters"].values())
        result |= {"ok": fastest >= wanted_speedup, "wanted_speedup": wanted_speedup, "best_speedup": fastest}
        result |= {"settings_refused": refused, "random_heads": list(random_heads)}
        result["floors"] = _floors(client, config, threads)
        if peer is not None:
            result |= _against(bench, config, peer, measured, peer_rates, runs, progress)
    return result


def _tried(
    bench: Bench, drafters: Sequence[str], nodes: int
) -> tuple[dict[Setting, dict[str, Any]], dict[str, str]]:
    """Every setting once, and why some could not be: a family may have fewer heads than a tree is deep. Raises
    ConfigError for a family that drafts none of its settings."""
    tried: dict[Setting, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name in drafters:
        for setting in settings_of(name, nodes):
            try:
                tried[setting] = bench.run(setting)
            except InvalidRequest as error:
                if error.field != "tree":
                    raise
                refused[str(setting)] = str(error)
        if not any(setting.drafter == name for setting in tried):
            raise ConfigError(f"{name} drafts no tree of {nodes} nodes or fewer", field="nodes",
                              remedy="allow more nodes, or leave the family out")
    return tried, refused


def _interleaved(
    bench: Bench, settings: Sequence[Setting], peer: TransformersPeer | None, runs: int, progress: Progress
) -> tuple[dict[Setting, list[dict[str, Any]]], list[float]]:
    measured: dict[Setting, list[dict[str, Any]]] = defaultdict(list)
    peer_rates: list[float] = []
    for index in range(runs):
        answers: dict[Setting, list[Answer]] = defaultdict(list)
        times: list[float] = []
        for number, ids in enumerate(bench.prompts):
            turn = (index + number) % len(settings)  # nobody is always the first
            for setting in (*settings[turn:], *settings[:turn]):
                answers[setting].append(bench.ask(setting, ids, bench.max_tokens))
            if peer is not None:
                times.append(peer.generate(ids, bench.max_tokens)[1])
        for setting in settings:
            measured[setting].append(bench.summary(answers[setting]))
        if peer is not None:
            peer_rates.append(len(times) / sum(times))
        progress(f"run {index + 1} of {runs}")
    return measured, peer_rates


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of runs that were measured in turns."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _rates(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [row["tokens_per_second"] for row in rows]


def _median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _summary(
    tried: dict[Setting, dict[str, Any]],
    best: dict[str, Setting],
    measured: dict[Setting, list[dict[str, Any]]],
    nodes: int,
) -> dict[str, Any]:
    plain = next((s for s in measured if s.drafter == "none"), None)
    table = {}
    for name, setting in best.items():
        rows = measured[setting]
        rate = _median(rows, "tokens_per_second")
        table[name] = {
            "tree": setting.tree, "tokens_per_second": rate, "runs": _rates(rows),
            "acceptance_length": rows[0]["acceptance_length"],
            "ms_per_verification": _median(rows, "ms_per_verification"),
            "best_acceptance_length": max(r["acceptance_length"] for s, r in tried.items() if s.drafter == name),
            "speedup_over_none": _paired(_rates(rows), _rates(measured[plain])) if plain else None,
            "repeated_8gram_share": repeated_share(rows[0]["answers"]),
        }  # fmt: skip
        if name in REMEMBERING:
            first = next(s for s in tried if s.drafter == name)
            kept = ("tokens_per_second", "acceptance_length")
            table[name]["first_time"] = {"tree": first.tree} | {key: tried[first][key] for key in kept}
    same = len({tuple(map(tuple, rows[0]["answers"])) for rows in measured.values()}) == 1
    settings = {str(s): {k: v for k, v in r.items() if k != "answers"} for s, r in tried.items()}
    return {"nodes": nodes, "drafters": table, "settings_tried": settings, "same_tokens": same}


def _floors(client: RouterClient, config: WorkerConfig, threads: int) -> dict[str, Any]:
    """The time that reading the weights once takes at the measured bandwidth: no plain step can be faster."""
    from pdspec.model.files import resolve

    weights = weight_bytes(resolve(config.model, config.cache_dir or None).config, config.dtype)
    bandwidth = read_bandwidth(threads)
    return {
        "weight_bytes": weights, "read_bytes_per_second": bandwidth, "step_ms": 1e3 * weights / bandwidth,
        "tokens_per_second": bandwidth / weights,
    }  # fmt: skip


def _against(
    bench: Bench, config: WorkerConfig, peer: TransformersPeer, measured: dict[Setting, list[dict[str, Any]]],
    peer_rates: Sequence[float], runs: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    plain = next(s for s in measured if s.drafter == "none")
    return {
        "ratio": _paired(_rates(measured[plain]), peer_rates),
        "transformers_tokens_per_second": statistics.median(peer_rates), "transformers_runs": list(peer_rates),
        "prefill": _prefill(bench, peer, runs, progress), "ttft": _ttft(bench, config, runs, progress),
    }  # fmt: skip


def _long_prompt(bench: Bench, length: int, salt: int) -> tuple[int, ...]:
    ids = [token for prompt in bench.prompts for token in prompt]
    whole = ids[salt % 7 :] * (length // len(ids) + 2)
    return tuple(whole[:length])


def _prefill(bench: Bench, peer: TransformersPeer, runs: int, progress: Progress) -> dict[str, Any]:
    """Prompt tokens per second: one token asked of the stack, one forward asked of transformers."""
    table = {}
    for length in PREFILL_LENGTHS:
        ours, theirs = [], []
        for index in range(runs):
            ids = _long_prompt(bench, length, index)
            ours.append(bench.ask(Setting("none"), ids, 1).ttft_ms / 1e3)
            theirs.append(peer.prefill_seconds(ids))
        mine, peers = length / statistics.median(ours), length / statistics.median(theirs)
        table[str(length)] = {"tokens_per_second": mine, "transformers": peers, "ratio": mine / peers}
        progress(f"prefill of {length}: {mine:.0f} tokens/s, transformers {peers:.0f}")
    return table


def _ttft(bench: Bench, config: WorkerConfig, runs: int, progress: Progress) -> dict[str, Any]:
    """Time to first token at 512 prompt tokens, through the stack and in one process."""
    local = LocalGenerator(config)
    try:
        through, alone = [], []
        for index in range(runs + 1):  # the first of each warms up
            ids = _long_prompt(bench, TTFT_TOKENS, index)
            through.append(bench.ask(Setting(config.drafter), ids, 2).ttft_ms)
            began = time.perf_counter()
            request = GenerateRequest(request_id="local", prompt_ids=ids, sampling=SamplingParams(max_tokens=2, seed=0))
            next(iter(local.generate(request)))
            alone.append(1e3 * (time.perf_counter() - began))
    finally:
        local.resources.close()
    if len(through) < 2:
        raise PdspecError("at least one run is needed", field="runs")
    a, b = statistics.median(through[1:]), statistics.median(alone[1:])
    progress(f"time to first token of {TTFT_TOKENS}: {a:.0f} ms, in one process {b:.0f} ms")
    return {"prompt_tokens": TTFT_TOKENS, "ttft_ms": a, "local_ttft_ms": b, "difference_ms": a - b}
