"""``pdspec check lossless``, part *joint*: two tokens in a row, sampled with a drafter, against the exact law.

The second token is the first that a draft foresees. The power is that against a drafter that is accepted too often: in
a share ``s`` of all rejections its token is put out instead of the one drawn from what is left, which makes of p the
mixture (1 - s) p + s q.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pdspec.engine.local import LocalGenerator
from pdspec.spec.ratio import masses_of
from pdspec.study.chi_square import fit, power
from pdspec.study.lossless_law import Law, Target
from pdspec.study.lossless_paths import answers
from pdspec.types import GenerateRequest, SamplingParams

TREE = "chain(2)"
SHARES = (0.05, 0.2, 1.0)  # of rejections that are not


def joint(
    local: LocalGenerator, *, drafter: str, verify: str, prompt: tuple[int, ...], params: SamplingParams, seeds: int,
    progress: Callable[[str], object],
) -> dict[str, Any]:  # fmt: skip
    """Chi-square of (t1, t2) over ``seeds``."""
    request = GenerateRequest(
        request_id="joint", prompt_ids=prompt, drafter=drafter, tree=TREE,
        sampling=replace(params, verify=verify, max_tokens=4, seed=0, ignore_eos=True),
    )  # fmt: skip
    law = Target(local, request.sampling, prompt).law(2)
    requests = [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in range(seeds)]
    counts = Counter(answer[:2] for answer in answers(local, requests))
    tested = fit(counts, law)
    powers = {str(share): power(law, _too_often(local, request, law, share), seeds) for share in SHARES}
    progress(f"  {drafter} {verify}: p = {tested.p_value:.3g} over {tested.bins} bins, power {powers}")
    return {"ok": tested.ok, "drafter": drafter, "verify": verify, **vars(tested), "power": powers}


def _too_often(local: LocalGenerator, request: GenerateRequest, law: Law, share: float) -> Law:
    """The law when a share of all rejections is none; q is cut to what the target may choose from (a token outside
    would be noticed at its first appearance)."""
    mixed: Law = {}
    for first in sorted({pair[0] for pair in law}):
        own = {pair: chance for pair, chance in law.items() if pair[0] == first}
        q = _q(local, request, first)
        inside, total = sum(q.get(pair[1], 0.0) for pair in own), sum(own.values())
        for pair, chance in own.items():
            drafted = q.get(pair[1], 0.0) / inside * total if inside > 0.0 else chance
            mixed[pair] = (1.0 - share) * chance + share * drafted
    return mixed


def _q(local: LocalGenerator, request: GenerateRequest, first: int) -> dict[int, float]:
    """What the first draft token is drawn from after ``first``."""
    held: list[list[int]] = []
    sampling = replace(request.sampling, allowed_ids=(first,), verify="rejection", top_k=0)
    try:
        sequence, _ = local.begin(replace(request, sampling=sampling), held)
        (draft,) = local.decode.propose([sequence])
        law = draft.laws[-1]
        return dict(zip(law.token_ids.tolist(), masses_of(law).tolist(), strict=True))
    finally:
        for pages in held:
            local.resources.pool.release(pages)
