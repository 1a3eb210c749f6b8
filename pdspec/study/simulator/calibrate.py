"""Step times of this machine's real workers, as its router's clients see them, and real runs to compare with.

One prefill and one decode worker as processes; everything that a step costs them (drafts, streams, Python) is in it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.study.simulator.times import Chances, WorkerTimes
from pdspec.study.simulator.traces import TraceRequest
from pdspec.study.stack import Stack
from pdspec.types import GenerationStats, SamplingParams, UserRequest

Progress = Callable[[str], object]
Ids = tuple[int, ...]
LENGTHS = (64, 256, 768)
_LONG = 1024


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One answer: (seconds since it was asked for, tokens) of each chunk."""

    chunks: tuple[tuple[float, int], ...]
    asked_at: float
    stats: GenerationStats

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks of verifications; the first, which waits for the handoff, is left out."""
        return [after[0] - before[0] for before, after in pairwise(self.chunks[1:])]

    @property
    def chances(self) -> Chances:
        """How often a verification put out 1, 2, … tokens."""
        counts = Counter(tokens for _, tokens in self.chunks[1:])
        total = max(1, counts.total())
        return tuple(counts[size + 1] / total for size in range(max(counts, default=1)))


class Asking:
    """Greedy answers of exact lengths from one endpoint; prompts are cut from, or repeat, those given."""

    def __init__(self, endpoint: str, prompts: Sequence[Ids], drafter: str, tree: str) -> None:
        self.endpoint, self.prompts, self.drafter, self.tree = endpoint, prompts, drafter, tree

    def ask(self, number: int, length: int, tokens: int) -> Seen:
        """One answer; ``length`` 0: the prompt as it is."""
        ids = self.prompts[number % len(self.prompts)]
        if length:
            turned = (*self.prompts[number % len(self.prompts) :], *self.prompts)
            joined = [token for prompt in turned for token in prompt]
            ids = tuple((joined * (length // len(joined) + 1))[:length])
        request = UserRequest(
            prompt_ids=ids, drafter=self.drafter, tree=self.tree,
            sampling=SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0),
        )  # fmt: skip
        chunks, stats = [], GenerationStats()
        with RouterClient(self.endpoint) as client:
            client.workers()
            began = time.perf_counter()
            for piece in client.stream(request):
                chunks.append((time.perf_counter() - began, len(piece.chunk.token_ids)))
                stats = piece.chunk.stats or stats
        return Seen(chunks=tuple(chunks), asked_at=began, stats=stats)

    def together(self, count: int, length: int, tokens: int) -> list[Seen]:
        """``count`` at once."""
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda number: self.ask(number, length, tokens), range(count)))


def calibrate(
    config: WorkerConfig, prompts: Sequence[Ids], *, drafter: str, tree: str = "",
    batches: Sequence[int] = (1, 2, 4, 8), tokens: int = 64, runs: int = 3, progress: Progress,
) -> WorkerTimes:  # fmt: skip
    """The table of ``drafter`` with ``tree``. Medians; give the machine nothing else to do."""
    with Stack(config, progress=progress) as stack:
        asking = Asking(stack.endpoint, prompts, drafter, tree)
        asking.ask(0, 0, 8)
        prefills = [(length, asking.ask(run, length, 2)) for run in range(runs) for length in LENGTHS]
        computed = [seen.stats.prefill_ms / 1e3 for _, seen in prefills]
        token_s, chunk_s = np.polyfit([length for length, _ in prefills], computed, 1)
        request_s = float(np.median([seen.chunks[0][0] - seen.stats.prefill_ms / 1e3 for _, seen in prefills]))
        progress(f"prefill {1e3 * chunk_s:.1f} ms + {1e6 * token_s:.0f} us a token, a request {1e3 * request_s:.1f} ms")
        steps, answers = [], list[Seen]()
        for batch in batches:
            seen = asking.together(batch, 0, tokens)
            answers += seen
            steps.append(float(np.median([gap for one in seen for gap in one.gaps])))
            progress(f"a step of {batch}: {1e3 * steps[-1]:.2f} ms")
        long = asking.ask(0, _LONG, tokens)
        short = [len(prompt) for prompt in prompts]
        kv_token_s = max(0.0, (float(np.median(long.gaps)) - steps[0]) / (_LONG - float(np.mean(short))))
        waits = [one.chunks[1][0] - one.chunks[0][0] for one in (*answers[:1], long)]
        beside = _beside_prefills(asking, tokens)
    own = kv_token_s * float(np.mean(short))
    base = [max(1e-6, one - batch * own) for batch, one in zip(batches, steps, strict=True)]
    return WorkerTimes(
        batches=tuple(batches), step_s=tuple(np.maximum.accumulate(base).tolist()), kv_token_s=kv_token_s,
        chunk_s=max(0.0, float(chunk_s)), token_s=max(0.0, float(token_s)), request_s=max(0.0, request_s),
        handoff_s=max(0.0, float(np.median(waits)) - steps[0]), chances=tuple(one.chances for one in answers),
        speeds=(1.0, min(1.0, steps[0] / beside)), source=f"measured: {config.model}, {drafter} {tree}".strip(),
    )  # fmt: skip


def _beside_prefills(asking: Asking, tokens: int) -> float:
    """Seconds of a step of one sequence while prompts are computed on the other worker."""
    over = threading.Event()

    def prefills() -> None:
        while not over.is_set():
            asking.ask(1, LENGTHS[-1], 1)

    busy = threading.Thread(target=prefills)
    busy.start()
    try:
        return float(np.median(asking.ask(0, 0, tokens).gaps))
    finally:
        over.set()
        busy.join()


def real(
    config: WorkerConfig, prompts: Sequence[Ids], trace: Sequence[TraceRequest], *, prefill: int, decode: int,
    drafter: str, tree: str, progress: Progress,
) -> list[tuple[float, float, float, int]]:  # fmt: skip
    """The trace on real workers of this machine, its prompts cut to length: (arrival, first token, last token, tokens)
    of each, as ``run.measured`` takes them."""
    rows: dict[int, tuple[float, float, float, int]] = {}
    with Stack(config, prefill=prefill, decode=decode, progress=progress) as stack:
        asking = Asking(stack.endpoint, prompts, drafter, tree)
        asking.together(2 * decode, 0, 8)
        began = time.perf_counter()

        def one(number: int) -> None:
            request = trace[number]
            time.sleep(max(0.0, began + request.arrival_s - time.perf_counter()))
            seen = asking.ask(number, request.prompt, request.output)
            start = seen.asked_at - began
            rows[number] = start, start + seen.chunks[0][0], start + seen.chunks[-1][0], request.output

        with ThreadPoolExecutor(len(trace)) as pool:
            list(pool.map(one, range(len(trace))))
    return [rows[number] for number in sorted(rows)]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Of simulated from measured figures, as shares of the latter."""
    named = {"throughput": ("tokens_per_second",), "p50": ("total_ms", "p50"), "p99": ("total_ms", "p99")}

    def at(values: Any, path: Sequence[str]) -> float:
        for name in path:
            values = values[name]
        return float(values)

    return {name: at(found, path) / at(expected, path) - 1.0 for name, path in named.items()}
