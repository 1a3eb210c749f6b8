"""Runs that studies compare: a drafter with a tree and a way of verifying, in one process and behind the handoff.

One request after the other, so that times are a single answer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.engine.decode import DecodeEngine
from pdspec.engine.local import LocalGenerator
from pdspec.engine.resources import Resources
from pdspec.model.tokenizer import load_tokenizer
from pdspec.repetition import repeated_share
from pdspec.study.prompts import study_prompts
from pdspec.study.stack import Stack
from pdspec.types import GenerateRequest, GenerationStats, SamplingParams, UserRequest, Verify

Progress = Callable[[str], object]
Prompts = Sequence[tuple[int, ...]]
# By their number of nodes: of eight, those that a head is likeliest to have right whose first four children are right
# in 40, 14, 7 and 4 of 100 cases (SmolLM2-135M's shipped EAGLE-3 head, greedy).
STATIC_SHAPES = {4: "static(2x1)", 8: "static(0 1 2 3 0.0 0.1 1.0 0.0.0)"}
REMEMBERING = ("suffix", "combined")  # draft from earlier answers, too: an answer given before helps
_BYTES = ("kv_bytes", "draft_kv_bytes", "hidden_bytes")
_SETTLE_S = 1.2  # two heartbeats of a router


@dataclass(frozen=True, kw_only=True)
class Way:
    """A drafter with a tree, a temperature and a way of verifying."""

    drafter: str
    tree: str
    temperature: float
    verify: str = Verify.COUPLED.value
    draft_prefill: str = ""

    def __str__(self) -> str:
        parts = (self.drafter, self.tree, f"T={self.temperature:g}", self.verify, self.draft_prefill)
        return " ".join(part for part in parts if part)

    def requests(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[GenerateRequest]:
        """One for each prompt, each with a seed of its own."""
        params = SamplingParams(
            temperature=self.temperature, max_tokens=max_tokens, ignore_eos=True, verify=self.verify
        )
        return [
            GenerateRequest(
                request_id=f"{index}", prompt_ids=ids, drafter=self.drafter, tree=self.tree,
                draft_prefill=self.draft_prefill, sampling=replace(params, seed=9000 + index),
            )
            for index, ids in enumerate(prompts)
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Served:
    """Answers of one way, and the seconds that went by."""

    answers: tuple[tuple[int, ...], ...]
    stats: tuple[GenerationStats, ...]
    clocks: dict[str, float]  # seconds of drafting, of target forwards, of judging
    decode_seconds: float

    @property
    def acceptance_length(self) -> float:
        """Output tokens per verification; the first token of an answer comes from prefill."""
        tokens = sum(len(answer) - 1 for answer in self.answers)
        return tokens / max(1, sum(stats.verifications for stats in self.stats))

    def rates(self) -> dict[str, Any]:
        """Acceptance, milliseconds of drafting and verifying per verification, tokens per second."""
        verifications = max(1, sum(stats.verifications for stats in self.stats))
        return {
            "acceptance_length": self.acceptance_length, "acceptance_per_position": self.positions(),
            "draft_ms": 1e3 * self.clocks["draft"] / verifications,
            "verify_ms": 1e3 * (self.clocks["forward"] + self.clocks["verify"]) / verifications,
            "tokens_per_second": sum(len(answer) - 1 for answer in self.answers) / self.decode_seconds,
        }  # fmt: skip

    def positions(self) -> list[float]:
        """Acceptance at each depth, of the verifications that reached it."""
        deepest = max((len(stats.reached_per_position) for stats in self.stats), default=0)
        totals = np.zeros((2, deepest))
        for stats in self.stats:
            for row, counts in enumerate((stats.accepted_per_position, stats.reached_per_position)):
                totals[row, : len(counts)] += counts
        return [float(a / r) for a, r in totals.T if r > 0]


def prompt_ids(config: WorkerConfig, prompts: str | None, count: int) -> list[tuple[int, ...]]:
    """Prompts as a chat's first turn."""
    tokenizer = load_tokenizer(config.model, config.cache_dir or None)
    texts = [prompt.text for prompt in study_prompts(prompts, count)]
    return [tuple(tokenizer.apply_chat([{"role": "user", "content": text}])) for text in texts]


def in_one_process(
    config: WorkerConfig, ways: Sequence[Way], ids: Prompts, max_tokens: int, progress: Progress,
    engine: Callable[[Resources], DecodeEngine] = DecodeEngine,
) -> dict[Way, Served]:  # fmt: skip
    """The reference. ``engine`` makes the engine that decodes, anew for each way."""
    generator, found = LocalGenerator(config), {}
    try:
        for way in ways:
            decode = generator.decode = engine(generator.resources)
            answers, stats = [], []
            for request in way.requests(ids, max_tokens):
                chunks = list(generator.generate(request))
                answers.append(tuple(token for chunk in chunks for token in chunk.token_ids))
                stats.append(chunks[-1].stats or GenerationStats())
            found[way] = Served(
                answers=tuple(answers), stats=tuple(stats), clocks=dict(decode.clocks),
                decode_seconds=sum(decode.clocks.values()),
            )
            progress(f"in one process: {way}: {found[way].acceptance_length:.3f} per verification")
    finally:
        generator.resources.close()
    return found


def behind_the_handoff(
    config: WorkerConfig, ways: Sequence[Way], ids: Prompts, max_tokens: int, progress: Progress
) -> dict[Way, Served]:
    """Through router, prefill and decode worker."""
    found = {}
    with Stack(config, progress=progress) as stack, RouterClient(stack.endpoint) as client:

        def clocks() -> dict[str, float]:
            worker = next(entry for entry in client.workers() if entry["role"] == "decode")
            return {name: worker["metrics"].get(f"{name}_seconds", 0.0) for name in ("draft", "forward", "verify")}

        for way in ways:
            before, answers, stats, seconds = clocks(), [], [], 0.0
            for request in way.requests(ids, max_tokens):
                answer = client.generate(UserRequest(
                    prompt_ids=request.prompt_ids, sampling=request.sampling, drafter=way.drafter, tree=way.tree,
                    draft_prefill=way.draft_prefill,
                ))  # fmt: skip
                answers.append(answer.token_ids)
                stats.append(answer.stats)
                seconds += (answer.total_ms - answer.ttft_ms) / 1e3
            after = _settled(clocks)
            found[way] = Served(
                answers=tuple(answers), stats=tuple(stats), decode_seconds=seconds,
                clocks={name: after[name] - before[name] for name in after},
            )
            progress(f"behind the handoff: {way}: {found[way].acceptance_length:.3f} per verification")
    return found


def _settled(clocks: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The worker's clocks once two heartbeats say the same."""
    seen: dict[str, float] = {}
    while (now := clocks()) != seen:
        seen = now
        time.sleep(_SETTLE_S)
    return seen


def row(way: Way, behind: Served, alone: Served) -> dict[str, Any]:
    """What a table shows of a way: rates and acceptance behind the handoff, and, ``local_``, in one process."""
    verifications = max(1, sum(stats.verifications for stats in behind.stats))
    return {
        "drafter": way.drafter, "tree": way.tree, "temperature": way.temperature, "verify": way.verify,
        **behind.rates(), **{f"local_{name}": value for name, value in alone.rates().items()},
        "drafted_per_verification": sum(stats.drafted_tokens for stats in behind.stats) / verifications,
        "repeated_8gram_share": repeated_share(behind.answers),
        **{name: sum(getattr(stats, name) for stats in behind.stats) for name in _BYTES},
        "same_answers": behind.answers == alone.answers,
    }  # fmt: skip
