"""``pdspec check handoff``: the drafter that decodes behind a handoff is the one that would decode in one process.

(a) in exact float32 the proposals (ids, parents) and accepted counts of *every* verification are identical, for direct
    and relay, draft prefill on either side, chunked and unchunked prompts;
(b) in bf16 the acceptance length is within 1 % of one process over many tokens, and the acceptance of the first
    verification after the handoff within two standard deviations.

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
from pdspec.study.parity import CONCURRENT, requests_for
from pdspec.study.stack import Stack
from pdspec.types import DraftTrace, GenerateRequest, UserRequest

Progress = Callable[[str], object]
TREES = ("chain(3)", "dynamic(4,4,8)")
CHUNKS = {"chunked": 24, "unchunked": 2048}


@dataclass(frozen=True, kw_only=True)
class Traced:
    """An answer with the draft of each verification."""

    tokens: tuple[int, ...]
    traces: tuple[DraftTrace, ...]


def run(
    *, worker: dict[str, Any], prompts: str | None, num_prompts: int, max_tokens: int, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """``ok`` when both parts hold; part (b) runs where the dtype given is not float32."""
    parts: dict[str, Any] = {}
    if worker.get("dtype", "float32") == "float32":
        config = WorkerConfig.from_mapping({**worker, "dtype": "float32"})
        parts["proposals"] = _proposals(config, prompts, num_prompts, max_tokens, progress)
    if worker.get("dtype", "bfloat16") == "bfloat16":
        config = WorkerConfig.from_mapping({**worker, "dtype": "bfloat16"})
        parts["acceptance"] = _acceptance(config, prompts, num_prompts, max_tokens, progress)
    return {"ok": all(part["ok"] for part in parts.values()), **parts}


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


def _proposals(
    config: WorkerConfig, prompts: str | None, num_prompts: int, max_tokens: int, progress: Progress
) -> dict[str, Any]:
    base = [replace(r, drafter="eagle3", trace=True) for r in requests_for(config, prompts, num_prompts, max_tokens)]
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


def _acceptance(
    config: WorkerConfig, prompts: str | None, num_prompts: int, max_tokens: int, progress: Progress
) -> dict[str, Any]:
    requests = [
        replace(r, drafter="eagle3", trace=True) for r in requests_for(config, prompts, num_prompts, max_tokens)
    ]
    alone = _local(config, requests)
    with Stack(config) as stack:
        behind = _served(stack.endpoint, requests, "direct")
    lengths = [_length(answers) for answers in (behind, alone)]
    first = [[a.traces[0].accepted for a in answers if a.traces] for answers in (behind, alone)]
    means = [statistics.fmean(values) if values else 0.0 for values in first]
    spread = math.sqrt(statistics.pvariance(first[1]) / max(1, len(first[1]))) if first[1] else 0.0
    ratio = lengths[0] / lengths[1]
    ok = abs(ratio - 1) <= 0.01 and abs(means[0] - means[1]) <= 2 * spread + 1e-9
    progress(f"  acceptance length {lengths[0]:.4f} behind the handoff, {lengths[1]:.4f} in one process")
    return {
        "ok": ok, "ratio": ratio, "acceptance_length": lengths[0], "local_acceptance_length": lengths[1],
        "first_accepted": means[0], "local_first_accepted": means[1], "first_standard_error": spread,
        "tokens": sum(len(a.tokens) for a in behind),
        "same_tokens": [a.tokens for a in behind] == [a.tokens for a in alone],
    }  # fmt: skip


def _length(answers: Sequence[Traced]) -> float:
    tokens = sum(len(answer.tokens) - 1 for answer in answers)
    return tokens / max(1, sum(len(answer.traces) for answer in answers))
