"""``pdspec check handoff``: the drafter that decodes behind a handoff is the one that would decode in one process.

``proposals``    in exact float32 the proposals (ids, parents) and accepted counts of *every* verification are the
                 same, for direct and relay, draft prefill on either side, chunked and unchunked prompts;
``draft_state``  draft KV and next-draft logits on the decode worker equal a recompute by other code, after the handoff
                 and after each of 20 verifications (``handoff_state``);
``controls``     an overfitted head is accepted behind the handoff, and each way of breaking what is handed over is
                 seen (``handoff_controls``);
``acceptance``   in bf16 the acceptance length is within 1 % of one process over many tokens, and the acceptance of the
                 first verification after the handoff within two standard deviations.

Coupled sampling would hide a stale draft state (tokens stay right, only acceptance falls); this check does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError
from pdspec.settings import unknown_name
from pdspec.study.handoff_controls import controls
from pdspec.study.handoff_state import draft_state
from pdspec.study.pair import CONCURRENT, Traced
from pdspec.study.parity import requests_for
from pdspec.study.stack import Stack
from pdspec.types import DraftTrace, GenerateRequest, UserRequest

Progress = Callable[[str], object]
DTYPE_OF = {"proposals": "float32", "draft_state": "float32", "controls": "float32", "acceptance": "bfloat16"}
PARTS = tuple(DTYPE_OF)
TREES = ("chain(3)", "dynamic(4,4,8)")
ALONE = {"survival": "fixed", "budget": "fixed"}  # proposals are a function of the request, whatever was served before
CHUNKS = {"chunked": 24, "unchunked": 2048}
STATE_PROMPTS = 2  # of ``draft_state``
TOKENS = 20_000  # of ``acceptance``
TEMPERATURES = (0.6, 0.8, 1.0)  # of prompts that are asked again


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of the parts that take prompts. ``tokens``: least output tokens of ``acceptance``."""

    prompts: str | None
    num_prompts: int
    max_tokens: int
    tokens: int = TOKENS

    def requests(self, config: WorkerConfig) -> list[GenerateRequest]:
        """Each prompt greedy and sampled, traced, for the learned drafter."""
        found = requests_for(config, self.prompts, self.num_prompts, self.max_tokens)
        return [replace(request, drafter="eagle3", trace=True) for request in found]


def run(
    *, worker: dict[str, Any], asked: Asked, progress: Progress, parts: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """``ok`` when every part holds. ``parts``: those of PARTS to run; none named: all of the dtype given, or all.
    Raises ConfigError for a part that does not exist, or that another dtype than the one given belongs to."""
    dtype = worker.get("dtype")
    chosen = parts or [name for name in PARTS if dtype in (None, DTYPE_OF[name])]
    for name in chosen:
        if name not in PARTS:
            raise unknown_name("part", name, PARTS, field="parts")
        if dtype not in (None, DTYPE_OF[name]):
            raise ConfigError(
                f"part {name} is about {DTYPE_OF[name]}, not {dtype}", field="parts", remedy="leave --dtype out"
            )
    result: dict[str, dict[str, Any]] = {}
    for name in chosen:
        progress(f"{name}:")
        config = WorkerConfig.from_mapping({**worker, **ALONE, "dtype": DTYPE_OF[name]})
        match name:
            case "proposals":
                result[name] = _proposals(config, asked.requests(config), progress)
            case "draft_state":
                result[name] = draft_state(config, asked.requests(config)[: 2 * STATE_PROMPTS : 2], progress)
            case "controls":
                result[name] = controls(config, progress)
            case "acceptance":
                result[name] = _acceptance(config, asked, progress)
    return {"ok": all(part["ok"] for part in result.values()), **result}


def _local(config: WorkerConfig, requests: Sequence[GenerateRequest]) -> list[Traced]:
    """The reference: the same requests in this process, ``CONCURRENT`` at a time."""
    generator = LocalGenerator(config)
    tokens: list[list[int]] = [[] for _ in requests]
    traces: list[list[DraftTrace]] = [[] for _ in requests]
    try:
        for start in range(0, len(requests), CONCURRENT):
            for index, chunk in generator.generate_batch(requests[start : start + CONCURRENT]):
                tokens[start + index] += chunk.token_ids
                traces[start + index] += [chunk.trace] if chunk.trace else []
    finally:
        generator.resources.close()
    return [Traced(tokens=tuple(t), traces=tuple(d)) for t, d in zip(tokens, traces, strict=True)]


def _served(endpoint: str, requests: Sequence[GenerateRequest], handoff: str) -> list[Traced]:
    def ask(request: GenerateRequest) -> Traced:
        user = UserRequest(
            prompt_ids=request.prompt_ids, sampling=request.sampling, drafter=request.drafter, tree=request.tree,
            draft_prefill=request.draft_prefill, handoff=handoff, trace=True,
        )  # fmt: skip
        with RouterClient(endpoint) as client:
            chunks = [piece.chunk for piece in client.stream(user)]
        return Traced(
            tokens=tuple(token for chunk in chunks for token in chunk.token_ids),
            traces=tuple(chunk.trace for chunk in chunks if chunk.trace),
        )

    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(ask, requests))


def _proposals(config: WorkerConfig, base: Sequence[GenerateRequest], progress: Progress) -> dict[str, Any]:
    wanted = {tree: _local(config, [replace(r, tree=tree) for r in base]) for tree in TREES}
    cases = verifications = 0
    different: list[str] = []
    for name, chunk in CHUNKS.items():
        with Stack(config, prefill_changes={"chunk": chunk}) as stack:
            for handoff in ("direct", "relay"):
                for mode in ("prefill", "decode"):
                    for tree in TREES:
                        requests = [replace(r, tree=tree, draft_prefill=mode) for r in base]
                        answers = _served(stack.endpoint, requests, handoff)
                        bad = [r.request_id for r, a, b in zip(requests, answers, wanted[tree], strict=True) if a != b]
                        cases, verifications = cases + len(answers), verifications + sum(len(a.traces) for a in answers)
                        label = f"{name} {handoff} draft_prefill={mode} {tree}"
                        different += [f"{label}: {one}" for one in bad]
                        progress(f"  {label}: {len(bad)} of {len(answers)} differ")
    return {"ok": not different, "cases": cases, "verifications": verifications, "different": different[:20]}


def _acceptance(config: WorkerConfig, asked: Asked, progress: Progress) -> dict[str, Any]:
    base, requests, alone = asked.requests(config), list[GenerateRequest](), list[Traced]()
    turn = 0
    while sum(len(answer.tokens) for answer in alone) < asked.tokens:  # every turn writes a token per request at least
        more = base if turn == 0 else [_again(request, turn) for request in base]
        requests, alone, turn = [*requests, *more], [*alone, *_local(config, more)], turn + 1
        progress(f"  {sum(len(answer.tokens) for answer in alone)} tokens in one process")
    with Stack(config) as stack:
        behind = _served(stack.endpoint, requests, "direct")
    lengths = [_length(answers) for answers in (behind, alone)]
    first = [[a.traces[0].accepted for a in answers if a.traces] for answers in (behind, alone)]
    means = [statistics.fmean(values) if values else 0.0 for values in first]
    spread = math.sqrt(statistics.pvariance(first[1]) / max(1, len(first[1]))) if first[1] else 0.0
    ratio = lengths[0] / lengths[1]
    tokens = sum(len(answer.tokens) for answer in behind)
    ok = abs(ratio - 1) <= 0.01 and abs(means[0] - means[1]) <= 2 * spread + 1e-9 and tokens >= asked.tokens
    progress(f"  acceptance length {lengths[0]:.4f} behind the handoff, {lengths[1]:.4f} in one process")
    return {
        "ok": ok, "ratio": ratio, "acceptance_length": lengths[0], "local_acceptance_length": lengths[1],
        "first_accepted": means[0], "local_first_accepted": means[1], "first_standard_error": spread,
        "tokens": tokens, "tokens_wanted": asked.tokens, "requests": len(requests),
        "same_tokens": [a.tokens for a in behind] == [a.tokens for a in alone],
    }  # fmt: skip


def _again(request: GenerateRequest, turn: int) -> GenerateRequest:
    """The same prompt with another seed and temperature."""
    seed, temperature = request.sampling.seed or 0, TEMPERATURES[turn % len(TEMPERATURES)]
    if request.sampling.temperature == 0:
        seed += 500_000
    params = replace(request.sampling, seed=seed + 10_000 * turn, temperature=temperature)
    return replace(request, request_id=f"{request.request_id}-{turn}", sampling=params)


def _length(answers: Sequence[Traced]) -> float:
    tokens = sum(len(answer.tokens) - 1 for answer in answers)
    return tokens / max(1, sum(len(answer.traces) for answer in answers))
