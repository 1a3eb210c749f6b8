"""``pdspec check lossless``, part *answers*: on a real model every family and tree gives plain decoding's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pdspec.engine.local import LocalGenerator
from pdspec.study.audit import Audit, tolerance
from pdspec.study.lossless_joint import joint
from pdspec.study.parity import CONCURRENT, audited, reference, requests_for, trees_of
from pdspec.types import SamplingParams

JOINT = SamplingParams(temperature=0.8, top_k=20)


def answers(
    local: LocalGenerator, drafters: Sequence[str], *, num_prompts: int, max_tokens: int, prompts: str | None,
    progress: Callable[[str], object],
) -> dict[str, Any]:  # fmt: skip
    """``num_prompts`` prompts, each greedy and at temperature 0.8: token for token in exact numerics, else audited."""
    resources = local.resources
    requests = requests_for(resources.config, prompts, num_prompts, max_tokens)
    expected = reference(local, requests)
    exact = resources.fingerprint["numerics"] != "fast"
    tau = tolerance(resources, requests[0].prompt_ids, expected[0])
    found, different, count = Audit(), {}, 0
    for name in drafters:
        if name == "none":
            continue
        for tree in trees_of(resources.drafters[name], resources.config.plugins):
            wrong = 0
            asked = [replace(request, drafter=name, tree=tree) for request in requests]
            for start in range(0, len(asked), CONCURRENT):
                given: dict[int, list[int]] = {}
                for index, chunk in local.generate_batch(asked[start : start + CONCURRENT]):
                    given.setdefault(index, []).extend(chunk.token_ids)
                for index, answer in given.items():
                    if tuple(answer) != expected[start + index]:
                        wrong += 1
                        found += audited(local, asked[start + index], answer, tau)
            different[f"{name} {tree}"] = wrong
            count += len(asked)
            progress(f"  {name} {tree}: {wrong} of {len(asked)} answers differ")
    ok = found.unaudited == 0 and not (exact and any(different.values()))
    return {
        "ok": ok, "numerics": "exact" if exact else "fast", "tau": tau, "answers": count, "different": different,
        "ties": found.ties, "unaudited": found.unaudited, "tokens": max_tokens,
    }  # fmt: skip


def joints(
    local: LocalGenerator, *, prompts: str | None, seeds: int, progress: Callable[[str], object]
) -> dict[str, Any]:  # fmt: skip
    """(t1, t2) of eagle3, coupled and by the ratio rule."""
    request = requests_for(local.resources.config, prompts, 1, 3)[0]
    parts = [
        joint(local, drafter="eagle3", verify=way, prompt=request.prompt_ids, params=JOINT, seeds=seeds,
              progress=progress)
        for way in ("coupled", "rejection")
    ]  # fmt: skip
    return {"ok": all(part["ok"] for part in parts), "parts": parts}
