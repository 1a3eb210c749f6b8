"""Positive controls of the handoff: a head that knows a text by heart is accepted behind it, and every way of breaking
what is handed over is seen.

The text is cut at many places; each beginning is a prompt, and the first verification behind the handoff is counted,
since nothing but handed-over state decides it. Acceptance is accepted over drafted tokens of a chain; per position it
is the share of the chains that came so far. (The token at position 1 is chosen on the prefill worker: breakages that
leave its own rows consistent, such as shifted positions, show from position 2 on.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.study.breakages import APPLY, DRAFTER, broken
from pdspec.study.full_acceptance import KNOWS, full_acceptance
from pdspec.study.memorised import Memorised, memorise
from pdspec.study.pair import Pair, Traced
from pdspec.types import GenerateRequest, SamplingParams

Progress = Callable[[str], object]
DEPTH = 4
CUTS = 24
HEALTHY = 0.95  # at least, at each position
BROKEN = 0.60  # below
CONTROLLED = (*APPLY, *KNOWS)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """Of the first verifications of some answers. ``same_text``: the target wrote the memorised tokens."""

    acceptance: float
    per_position: tuple[float, ...]
    chains: int
    same_text: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rounded = [round(share, 4) for share in self.per_position]
        return {"acceptance": round(self.acceptance, 4), "per_position": rounded, "chains": self.chains}


def control(config: WorkerConfig, drafter: str, progress: Progress) -> dict[str, Any]:
    """The part's report on one family of CONTROLLED."""
    return full_acceptance(config, drafter, progress) if drafter in KNOWS else controls(config, progress, drafter)


def controls(
    config: WorkerConfig, progress: Progress, drafter: str = DRAFTER, *, cuts: int = CUTS, steps: int = 0
) -> dict[str, Any]:
    """The report on a family with a head; ``ok`` when the head is accepted and no breakage is. ``steps`` of training
    (0: the family's)."""
    config = config.replace(
        dtype="float32", drafters=("none", drafter), drafter=drafter, heads={}, options={}, tree="", chunk=8192,
        cache_tokens=16384,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pdspec-memorised-") as folder:
        text = memorise(config, Path(folder), depth=DEPTH, steps=steps, drafter=drafter)
        hits = [round(hit, 3) for hit in text.hits]
        progress(f"  {drafter} memorised {len(text.tokens) - text.start} tokens: {hits} right")
        with Pair(config.replace(heads={drafter: folder})) as pair:
            return {**_measure(pair, text, drafter, cuts, progress), "training_loss": round(text.loss, 4)}


def _measure(pair: Pair, text: Memorised, drafter: str, cuts: int, progress: Progress) -> dict[str, Any]:
    requests = cut(text, cuts, drafter)
    healthy = count(pair.ask(requests), text, requests)
    progress(f"  healthy: {healthy.acceptance:.3f} {[round(share, 2) for share in healthy.per_position]}")
    found = {}
    for name in APPLY[drafter]:
        with broken(pair, name, drafter):
            pair.ask(requests[-1:])  # the request whose start the next one may get
            found[name] = count(pair.ask(requests), text, requests)
        progress(f"  {name}: {found[name].acceptance:.3f} {[round(s, 2) for s in found[name].per_position]}")
    return judge(healthy, found, drafter)


def judge(healthy: Accepted, found: dict[str, Accepted], drafter: str = DRAFTER) -> dict[str, Any]:
    """The verdict over what was measured: ``missed`` are the breakages that the control did not notice."""
    accepted = all(share >= HEALTHY for share in healthy.per_position)
    missed = [name for name in APPLY[drafter] if name not in found or not found[name].acceptance < BROKEN]
    same = healthy.same_text and all(one.same_text for one in found.values())
    return {
        "ok": accepted and same and not missed, "healthy": healthy.as_dict(), "missed": missed, "same_text": same,
        "breakages": {name: one.as_dict() for name, one in found.items()},
    }  # fmt: skip


def cut(text: Memorised, cuts: int, drafter: str = DRAFTER) -> list[GenerateRequest]:
    """Prompts that end at ``cuts`` places spread over the text, each asking for one whole chain."""
    first, last = text.start + 1, len(text.tokens) - DEPTH - 2
    places = sorted({first + (last - first) * n // max(1, cuts - 1) for n in range(cuts)})
    sampling = SamplingParams(max_tokens=DEPTH + 2, seed=0, ignore_eos=True)
    return [
        GenerateRequest(
            request_id=f"cut-{place}", prompt_ids=text.tokens[:place], sampling=sampling, drafter=drafter,
            tree=f"chain({DEPTH})", draft_prefill="prefill", trace=True,
        )
        for place in places
    ]  # fmt: skip


def count(answers: Sequence[Traced], text: Memorised, requests: Sequence[GenerateRequest]) -> Accepted:
    """Acceptance of the first verification of each answer. Raises ValueError for an answer without one."""
    firsts = [answer.traces[0] for answer in answers if answer.traces]
    if len(firsts) != len(requests):
        raise ValueError(f"{len(requests) - len(firsts)} answers without a verification")
    depths = [trace.accepted for trace in firsts]
    reached = [sum(depth >= position for depth in depths) for position in range(DEPTH + 1)]
    same = all(
        answer.tokens == text.tokens[len(request.prompt_ids) :][: len(answer.tokens)]
        for answer, request in zip(answers, requests, strict=True)
    )
    return Accepted(
        acceptance=sum(depths) / max(1, sum(len(trace.token_ids) for trace in firsts)),
        per_position=tuple(reached[d + 1] / max(1, reached[d]) for d in range(DEPTH)),
        chains=len(firsts), same_text=same,
    )  # fmt: skip
