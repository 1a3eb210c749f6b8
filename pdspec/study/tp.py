"""``pdspec check tp``: workers of several ranks hand over to each other what workers of one rank would.

For each model and pair of degrees (ranks of the prefill worker, of the decode worker) the same requests are answered
behind the handoff and by one rank in one process. Sums are taken in another order on several ranks, so equality is
*audited* (see ``audit``): tau is 8 times the largest change of a log probability between the two degrees on the same
prefixes, capped by dtype. The acceptance length must be within 1 % of one process; where the tokens are the same,
``same_drafts`` counts the answers whose every draft and accepted count is the same, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.engine.resources import Resources
from pdspec.errors import ConfigError
from pdspec.study.audit import CAPS, Audit, forced_logits
from pdspec.study.handoff_proposals import local, one_process
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.pair import Pair, Traced
from pdspec.study.parity import audited, requests_for
from pdspec.types import GenerateRequest

Progress = Callable[[str], object]
Degrees = tuple[int, int]
MODELS = ("tiny", "smollm2-135m")
ACCEPTANCE = 0.01  # how far acceptance lengths may lie apart
_ALONE = {"survival": "fixed", "budget": "fixed", "numerics": "fast", "cache_tokens": 8192}


def parse_degrees(text: str) -> list[Degrees]:
    """``2:1,1:2``: ranks of prefill and decode worker. Raises ConfigError."""
    found = []
    for pair in text.split(","):
        prefill, sign, decode = pair.strip().partition(":")
        if not (sign and prefill.isdecimal() and decode.isdecimal() and int(prefill) and int(decode)):
            raise ConfigError(f"{pair!r} is no pair of degrees", field="degrees", remedy="write e.g. 2:1,1:2")
        found.append((int(prefill), int(decode)))
    return found


def run(
    *, worker: dict[str, Any], degrees: Sequence[Degrees], drafters: Sequence[str], prompts: str | None,
    num_prompts: int, max_tokens: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``ok``: nothing unaudited and the same acceptance, for every model (``worker``'s, or MODELS) and degree. Raises
    ConfigError."""
    models = (worker["model"],) if "model" in worker else MODELS
    cases = []
    for model in models:
        asked = worker_config({"dtype": "float32", **worker, **_ALONE, "model": model}, drafters)
        config, random_heads = with_random_heads(asked)
        base = requests_for(config, prompts, num_prompts, max_tokens)
        requests = [
            replace(one, request_id=f"{one.request_id}-{name}", drafter=name, trace=True)
            for name in drafters for one in base
        ]  # fmt: skip
        with one_process(config) as generator:
            wanted = local(generator, requests)
            for pair in degrees:
                cases.append(_case(config, generator, requests, wanted, pair))
                cases[-1]["random_heads"] = list(random_heads)
                progress(f"{model} {pair[0]}:{pair[1]}: {_told(cases[-1])}")
    return {"ok": all(case["ok"] for case in cases), "dtype": config.dtype, "drafters": list(drafters), "cases": cases}


def _case(
    config: WorkerConfig, generator: LocalGenerator, requests: Sequence[GenerateRequest], wanted: Sequence[Traced],
    degrees: Degrees,
) -> dict[str, Any]:  # fmt: skip
    prefill, decode = degrees
    with Pair(config, prefill_changes={"tp": prefill}, decode_changes={"tp": decode}) as pair:
        answers = pair.ask(requests)
        worker = pair.prefill if prefill > 1 else pair.decode
        resources = worker.engine.host.resources
        change = pair.on_engine(worker, lambda: _change(generator.resources, resources, requests[0], wanted[0]))
    tau, found = min(8 * change, CAPS[config.dtype]), Audit()
    same = [answer.tokens == other.tokens for answer, other in zip(answers, wanted, strict=True)]
    for request, answer, equal in zip(requests, answers, same, strict=True):
        if not equal:
            found += audited(generator, request, answer.tokens, tau)
    lengths = {name: (_length(requests, answers, name), _length(requests, wanted, name)) for name in config.drafters}
    ratios = {name: mine / theirs for name, (mine, theirs) in lengths.items() if theirs}
    alike = [a == b for a, b, equal in zip(answers, wanted, same, strict=True) if equal]
    return {
        "ok": found.unaudited == 0 and all(abs(ratio - 1) <= ACCEPTANCE for ratio in ratios.values()),
        "model": config.model, "prefill_tp": prefill, "decode_tp": decode, "answers": len(answers),
        "tokens": sum(len(answer.tokens) for answer in answers), "same_tokens": sum(same), "same_drafts": sum(alike),
        "unaudited": found.unaudited, "ties": found.ties, "tau": tau, "largest_change": change,
        "acceptance": {n: {"length": a, "one_process": b} for n, (a, b) in lengths.items() if n in ratios},
    }  # fmt: skip


def _change(one: Resources, several: Resources, request: GenerateRequest, answer: Traced) -> float:
    """The largest change of a log probability from one rank to several, over one answer."""
    tokens, first = [*request.prompt_ids, *answer.tokens[:-1]], len(request.prompt_ids) - 1
    sides = [forced_logits(side, tokens, first, rows=len(tokens)).log_softmax(-1) for side in (one, several)]
    return float(torch.sub(*sides).abs().max())


def _length(requests: Sequence[GenerateRequest], answers: Sequence[Traced], drafter: str) -> float:
    """Tokens per verification."""
    own = [answer for request, answer in zip(requests, answers, strict=True) if request.drafter == drafter]
    steps = sum(len(answer.traces) for answer in own)
    return sum(len(answer.tokens) - 1 for answer in own) / steps if steps else 0.0


def _told(case: dict[str, Any]) -> str:
    return (
        f"{case['same_tokens']} of {case['answers']} answers have the same tokens, {case['same_drafts']} the same"
        f" drafts, {case['unaudited']} tokens are unaudited, log probabilities change by {case['largest_change']:.1e}"
    )
