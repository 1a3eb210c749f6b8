"""``pdspec check handoff``: the drafter that decodes behind a handoff is the one that would decode in one process.

``proposals``    in exact float32 the proposals (ids, parents) and accepted counts of *every* verification are the
                 same, for direct and relay, draft prefill on either side, chunked and unchunked prompts;
``draft_state``  draft KV and next-draft logits on the decode worker equal a recompute by other code, after the handoff
                 and after each of 20 verifications (``handoff_state``);
``controls``     an overfitted head is accepted behind the handoff, and each way of breaking what is handed over is
                 seen (``handoff_controls``); a draft model that is the target, and sparse KV that is all of it, are
                 accepted whole (``full_acceptance``);
``acceptance``   in bf16 the acceptance length is within 1 % of one process over many tokens, and the acceptance of the
                 first verification after the handoff within two standard deviations.

Coupled sampling would hide a stale draft state (tokens stay right, only acceptance falls); this check does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError
from pdspec.settings import unknown_name
from pdspec.spec.heads import random_seed
from pdspec.spec.registry import NAMES
from pdspec.study.handoff_controls import CONTROLLED, control
from pdspec.study.handoff_proposals import local, one_process, proposals, served
from pdspec.study.handoff_state import FAMILIES as STATES
from pdspec.study.handoff_state import draft_state
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.pair import Traced
from pdspec.study.parity import requests_for
from pdspec.study.stack import Stack
from pdspec.study.ways import REMEMBERING
from pdspec.types import GenerateRequest

Progress = Callable[[str], object]
DTYPE_OF = {"proposals": "float32", "draft_state": "float32", "controls": "float32", "acceptance": "bfloat16"}
PARTS = tuple(DTYPE_OF)
ALONE = {"survival": "fixed", "budget": "fixed"}  # proposals are a function of the request, whatever was served before
DRAFTERS = ("eagle3",)
# What each part can be about: a proposal needs a drafter, a recompute other code, a control something to know by heart,
# and what is drafted must not depend on what was answered before.
SUBJECTS = {
    "proposals": NAMES[1:], "draft_state": STATES, "controls": CONTROLLED,
    "acceptance": tuple(name for name in NAMES[1:] if name not in REMEMBERING),
}
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
        """Each prompt greedy and sampled, traced."""
        found = requests_for(config, self.prompts, self.num_prompts, self.max_tokens)
        return [replace(request, trace=True) for request in found]


def run(
    *, worker: dict[str, Any], asked: Asked, progress: Progress, parts: Sequence[str] = (),
    drafters: Sequence[str] = DRAFTERS,
) -> dict[str, Any]:  # fmt: skip
    """``ok`` when every part holds for ``drafters``; families without a head draft with a random one
    (``random_heads``). ``parts``: those of PARTS to run; none named: all of the dtype given, or all. Raises ConfigError
    for a part that does not exist, or that another dtype than the one given belongs to."""
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
    random_heads: tuple[str, ...] = ()
    for name in chosen:
        about = [one for one in drafters if one in SUBJECTS[name]]
        if not about and not parts:
            continue
        if not about:
            raise ConfigError(f"part {name} says nothing about {', '.join(drafters)}", field="parts",
                              remedy="name some of " + ", ".join(SUBJECTS[name]) + " in drafters")
        progress(f"{name}:")
        asked_for = {**worker, **ALONE, "dtype": DTYPE_OF[name]}
        config, random_heads = with_random_heads(worker_config(asked_for, drafters))
        match name:
            case "proposals":
                result[name] = proposals(config, about, asked.requests(config), progress)
            case "draft_state":
                requests = asked.requests(config)[: 2 * STATE_PROMPTS : 2]
                result[name] = _each({
                    one: draft_state(config, requests, progress, drafter=one, accepting=not _random(config, one))
                    for one in about
                })
            case "controls":
                result[name] = _each({one: control(config, one, progress) for one in about})
            case "acceptance":
                result[name] = _each({one: _acceptance(config, one, asked, progress) for one in about})
    return {"ok": all(part["ok"] for part in result.values()), "drafters": list(drafters),
            "random_heads": list(random_heads), **result}  # fmt: skip


def _random(config: WorkerConfig, drafter: str) -> bool:
    """Whether a family's head knows nothing; eagle2 may use eagle1's."""
    where = config.heads.get(drafter) or (config.heads.get("eagle1") if drafter == "eagle2" else None)
    return where is not None and random_seed(where) is not None


def _each(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A part's report over families: the first one's figures, as where it is alone, and all in ``families``."""
    first = next(iter(found.values()))
    return {**first, "ok": all(one["ok"] for one in found.values()), "families": found}


def _acceptance(config: WorkerConfig, drafter: str, asked: Asked, progress: Progress) -> dict[str, Any]:
    base = [replace(request, drafter=drafter) for request in asked.requests(config)]
    requests, alone, turn = list[GenerateRequest](), list[Traced](), 0
    with one_process(config) as generator:
        while sum(len(answer.tokens) for answer in alone) < asked.tokens:  # each turn writes a token a request at least
            more = base if turn == 0 else [_again(request, turn) for request in base]
            requests, alone, turn = [*requests, *more], [*alone, *local(generator, more)], turn + 1
            progress(f"  {sum(len(answer.tokens) for answer in alone)} tokens in one process")
    with Stack(config) as stack:
        behind = served(stack.endpoint, requests, "direct")
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
