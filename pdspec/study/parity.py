"""``pdspec check parity``: every drafter, tree and handoff gives the tokens of plain decoding in one process.

Through real sockets and processes, greedy and sampled. In ``numerics: exact`` token for token; in ``fast`` audited.
Greedy answers are also audited against ``transformers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from pdspec.client import RouterClient
from pdspec.config import DTYPES, WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import InvalidRequest
from pdspec.model.reference import reference_model
from pdspec.model.tokenizer import load_tokenizer
from pdspec.spec.protocol import Drafter
from pdspec.spec.registry import family
from pdspec.study.audit import CAPS, Audit, forced_logits, judge, tolerance, transformers_logits
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.prompts import study_prompts
from pdspec.study.stack import Stack
from pdspec.telemetry import usable_cores
from pdspec.types import GenerateRequest, SamplingParams, UserRequest

Progress = Callable[[str], object]
# Of each kind the first that a family can draft: heads and modules may be fewer than a tree is deep.
TREES = {
    "chain": ("chain(3)", "chain(2)", "chain(1)"), "static": ("static(2x2)", "static(4)"),
    "dynamic": ("dynamic(4,4,8)", "dynamic(2,3,6)", "dynamic(1,4,4)"),
}  # fmt: skip
HANDOFFS = ("direct", "relay")
CONCURRENT = 8


def run(
    *, worker: dict[str, Any], drafters: Sequence[str], prompts: str | None, num_prompts: int, max_tokens: int,
    transformers: bool, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Both dtypes unless one is given. ``ok``: no mismatch in exact numerics, nothing unaudited anywhere. Families
    without a head draft with a random one (``random_heads``): their tokens are right or wrong all the same."""
    dtypes = (worker["dtype"],) if "dtype" in worker else DTYPES[::-1]
    parts = {}
    for dtype in dtypes:
        config, random_heads = with_random_heads(worker_config({**worker, "dtype": dtype}, drafters))
        progress(f"{dtype}:")
        parts[dtype] = _one(config, drafters, prompts, num_prompts, max_tokens, transformers, progress)
    totals = {key: sum(part[key] for part in parts.values()) for key in ("cases", "mismatched", "ties", "unaudited")}
    return {"ok": all(part["ok"] for part in parts.values()), **totals, "tokens": max_tokens, "dtypes": parts,
            "drafters": list(drafters), "random_heads": list(random_heads)}


def requests_for(config: WorkerConfig, prompts: str | None, num_prompts: int, max_tokens: int) -> list[GenerateRequest]:
    """Each prompt greedy and at temperature 0.8 with top_p 0.95 and a seed of its own."""
    tokenizer = load_tokenizer(config.model, config.cache_dir or None)
    found = []
    for index, prompt in enumerate(study_prompts(prompts, num_prompts)):
        ids = tuple(tokenizer.apply_chat([{"role": "user", "content": prompt.text}]))
        greedy = SamplingParams(max_tokens=max_tokens, seed=1000 + index)
        for params in (greedy, replace(greedy, temperature=0.8, top_p=0.95)):
            found.append(
                GenerateRequest(request_id=f"{prompt.id}-{params.temperature}", prompt_ids=ids, sampling=params)
            )
    return found


def reference(local: LocalGenerator, requests: Sequence[GenerateRequest]) -> list[tuple[int, ...]]:
    """Plain decoding in this process."""
    answers: list[list[int]] = [[] for _ in requests]
    for start in range(0, len(requests), CONCURRENT):
        part = [replace(request, drafter="none") for request in requests[start : start + CONCURRENT]]
        for index, chunk in local.generate_batch(part):
            answers[start + index] += chunk.token_ids
    return [tuple(answer) for answer in answers]


def served(
    endpoint: str, requests: Sequence[GenerateRequest], *, drafter: str, tree: str, handoff: str,
    draft_prefill: str = "",
) -> list[tuple[int, ...]]:  # fmt: skip
    """The answers of a running deployment, ``CONCURRENT`` at a time."""

    def ask(part: Sequence[GenerateRequest]) -> list[tuple[int, ...]]:
        with RouterClient(endpoint) as client:
            return [client.generate(_user(request)).token_ids for request in part]

    def _user(request: GenerateRequest) -> UserRequest:
        return UserRequest(
            prompt_ids=request.prompt_ids, sampling=request.sampling, drafter=drafter, tree=tree, handoff=handoff,
            draft_prefill=draft_prefill,
        )  # fmt: skip

    lanes = [requests[lane::CONCURRENT] for lane in range(CONCURRENT)]
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(ask, lanes))
    return [answers[index % CONCURRENT][index // CONCURRENT] for index in range(len(requests))]


def trees_of(drafter: Drafter, plugins: Sequence[str] = ()) -> list[str]:
    """The default tree and one of every other kind that the family drafts; an empty one where it drafts nothing."""
    kinds, found = family(drafter.name, plugins).DESCRIPTION.trees, [drafter.default_tree]
    for kind in (one for one in kinds if not drafter.default_tree.startswith(one)):
        found.append(first_drafted(drafter, TREES[kind]))
    return found


def first_drafted(drafter: Drafter, trees: Sequence[str]) -> str:
    """The first of ``trees`` that a drafter can draft. Raises StopIteration where there is none."""
    return next(tree for tree in trees if _drafts(drafter, tree))


def _drafts(drafter: Drafter, tree: str) -> bool:
    try:
        drafter.depth(tree)
    except InvalidRequest:
        return False
    return True


def _one(
    config: WorkerConfig, drafters: Sequence[str], prompts: str | None, num_prompts: int, max_tokens: int,
    transformers: bool, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    requests = requests_for(config, prompts, num_prompts, max_tokens)
    local = LocalGenerator(config)
    exact = local.resources.fingerprint["numerics"] != "fast"
    try:
        expected = reference(local, requests)
        progress(f"  plain decoding in one process: {sum(map(len, expected))} tokens")
        tau = tolerance(local.resources, requests[0].prompt_ids, expected[0])
        found, mismatched, cases = Audit(), 0, 0
        asked = [(name, tree) for name in drafters for tree in trees_of(local.resources.drafters[name], config.plugins)]
        with Stack(config) as stack:
            for drafter, tree in asked:
                for handoff in HANDOFFS:
                    answers = served(stack.endpoint, requests, drafter=drafter, tree=tree, handoff=handoff)
                    different = [i for i, answer in enumerate(answers) if answer != expected[i]]
                    mismatched, cases = mismatched + len(different), cases + len(answers)
                    for index in different:
                        found += audited(local, requests[index], answers[index], tau)
                    progress(f"  {drafter} {tree} {handoff}: {len(different)} of {len(answers)} answers differ")
        mode = "exact" if exact else "fast"
        result: dict[str, Any] = {"numerics": mode, "tau": tau, "cases": cases, "mismatched": mismatched}
        if transformers:
            result["transformers"] = _against_transformers(local, requests, expected, progress)
            against = result["transformers"]
            found += Audit(ties=against["ties"], unaudited=against["unaudited"])
    finally:
        local.resources.close()
    ok = found.unaudited == 0 and not (exact and mismatched)
    return {**result, "ok": ok, "ties": found.ties, "unaudited": found.unaudited}


def audited(local: LocalGenerator, request: GenerateRequest, answer: Sequence[int], tau: float) -> Audit:
    """The answer teacher-forced through the plain target, one row at a time."""
    tokens = [*request.prompt_ids, *answer[:-1]]
    logits = forced_logits(local.resources, tokens, len(request.prompt_ids) - 1, rows=1)
    return judge(logits, request, answer, local.resources.end_ids, tau)


def _against_transformers(
    local: LocalGenerator, requests: Sequence[GenerateRequest], answers: Sequence[tuple[int, ...]], progress: Progress
) -> dict[str, Any]:  # fmt: skip
    """Our greedy tokens, teacher-forced through transformers over the same weights (those of ``dtype``). It computes in
    float32: what it rounds to bf16 between operations moves its own scores by more than the cap. How it judges them in
    ``dtype`` stands beside, in ``same_dtype``, for comparison."""
    config = local.resources.config
    greedy = [pair for pair in zip(requests, answers, strict=True) if pair[0].sampling.temperature == 0]
    torch.set_num_threads(config.threads or usable_cores())

    def judged(dtype: str) -> dict[str, Any]:
        model, found = reference_model(local.resources.files, dtype), Audit()
        for request, answer in greedy:
            logits = transformers_logits(model, request.prompt_ids, answer)
            found += judge(logits, request, answer, local.resources.end_ids, CAPS[config.dtype])
        progress(f"  against transformers in {dtype}: {found}")
        return {"positions": found.positions, "ties": found.ties, "unaudited": found.unaudited,
                "largest_gap": found.largest}  # fmt: skip

    result = judged("float32")
    if config.dtype != "float32":
        result["same_dtype"] = judged(config.dtype)
    torch.set_num_threads(1)
    return result
