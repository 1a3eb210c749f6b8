"""Positive controls without a head: who drafts with the target's own scores is accepted whole, greedy and sampled.

A draft model that *is* the target, and sparse KV whose window is wider than the context, foresee every token under
coupled sampling: one node less in any verification would mean that state came over wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.study.pair import Pair
from pdspec.study.parity import requests_for
from pdspec.types import GenerateRequest, SamplingParams

Progress = Callable[[str], object]
KNOWS = ("draft_model", "sparse")
TREE, DEPTH, VERIFICATIONS, PROMPTS = "chain(4)", 4, 8, 4
TEMPERATURES = (0.0, 1.0)
SIDES = ("prefill", "decode")


def full_acceptance(config: WorkerConfig, drafter: str, progress: Progress) -> dict[str, Any]:
    """The report on one family of KNOWS: of each temperature the share of drafted tokens that was accepted. ``ok``
    when it is all of them, in as many verifications as there must be then."""
    heads = {"draft_model": config.model} if drafter == "draft_model" else {}
    options = {"sparse:sink": "0", "sparse:window": "1000000"} if drafter == "sparse" else {}
    config = config.replace(
        drafters=("none", drafter), drafter=drafter, heads=heads, options=options, tree="", cache_tokens=16384
    )
    base = requests_for(config, None, PROMPTS, 1)[::2]
    found: dict[str, float] = {}
    whole = True
    with Pair(config) as pair:
        for temperature in TEMPERATURES:
            asked = [_request(one, drafter, side, temperature) for one in base for side in SIDES]
            traces = [answer.traces for answer in pair.ask(asked)]
            drafted = sum(len(trace.token_ids) for each in traces for trace in each)
            accepted = sum(trace.accepted for each in traces for trace in each)
            found[f"{temperature:g}"] = accepted / max(1, drafted)
            whole &= accepted == drafted == len(asked) * VERIFICATIONS * DEPTH
            progress(f"  {drafter} T={temperature:g}: {accepted} of {drafted} accepted")
    return {"ok": whole, "acceptance": found, "answers": len(TEMPERATURES) * len(base) * len(SIDES)}


def _request(base: GenerateRequest, drafter: str, side: str, temperature: float) -> GenerateRequest:
    sampling = SamplingParams(
        max_tokens=1 + VERIFICATIONS * (DEPTH + 1), ignore_eos=True, temperature=temperature, seed=base.sampling.seed
    )
    return replace(
        base, request_id=f"{base.request_id} {side}", drafter=drafter, tree=TREE, draft_prefill=side, trace=True,
        sampling=sampling,
    )  # fmt: skip
