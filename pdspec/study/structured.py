"""``pdspec check structured``: answers keep to the structure that was asked for, and no drafter changes them.

families   every family and tree: plain decoding's very tokens, each a valid instance that ended by itself
ratio      verified by the ratio rule, whose tokens are others: valid all the same
replay     an answer that goes on elsewhere after any of its tokens goes on with the same ones
handoff    through router, prefill and decode worker (processes, direct and relayed): the same tokens
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jsonschema

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError
from pdspec.model.tokenizer import Tokenizer, load_tokenizer
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.parity import CONCURRENT, HANDOFFS, served, trees_of
from pdspec.study.stack import Stack
from pdspec.types import GenerateRequest, SamplingParams, Verify

PARTS = ("families", "ratio", "replay", "handoff")
Progress = Callable[[str], object]
Answers = list[tuple[int, ...]]

# Every instance is finite and short: an answer that is cut is no valid JSON, whatever the model says.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["calm", "cheerful", None, 7]},
        "scores": {"type": "array", "items": {"type": "number", "enum": [0.5, 1, 2]}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}, "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "scores", "home"],
    "additionalProperties": False,
}  # fmt: skip
REGEX = r"[A-Z][a-z]{2,8} [0-9]{4}-[01][0-9]-[0-3][0-9]( \((draft|final)\))?"
CHOICES = ("positive", "negative", "neither, nor: 50 %", "n\u00e9gatif")
STRUCTURES = (
    ("schema", "Describe a person as JSON.", {"json_schema": json.dumps(SCHEMA)}),
    ("regex", "Name a report and its date.", {"regex": REGEX}),
    ("choice", "What is the mood of: I lost my keys again?", {"choice": CHOICES}),
)
_LONGEST = 400  # bytes of any instance, which a tokenizer of bytes needs tokens for


def run(
    *, worker: dict[str, Any], drafters: Sequence[str], parts: Sequence[str] = (), seeds: int = 2, progress: Progress
) -> dict[str, Any]:
    """Each structure greedy and at temperature 0.9, with ``seeds`` seeds. ``ok``: nothing differs, nothing is invalid.
    Raises ConfigError for an unknown part."""
    wanted = tuple(parts) or PARTS
    if unknown := [part for part in wanted if part not in PARTS]:
        raise ConfigError(f"no part {unknown[0]!r}", field="parts", remedy="use some of " + ",".join(PARTS))
    config, random_heads = with_random_heads(worker_config(worker, drafters))
    tokenizer = load_tokenizer(config.model, config.cache_dir or None)
    requests = requests_for(tokenizer, seeds)
    local = LocalGenerator(config)
    try:
        plain = answered(local, [replace(one, drafter="none") for one in requests])
        checks = {
            "families": lambda: _families(local, tokenizer, requests, plain, drafters, progress),
            "ratio": lambda: _ratio(local, tokenizer, requests, drafters),
            "replay": lambda: _replay(local, requests, plain, drafters),
            "handoff": lambda: _handoff(config, requests, plain, drafters, progress),
        }
        found: dict[str, Any] = {"plain": _judged(tokenizer, requests, plain)}
        for part in wanted:
            progress(f"{part} …")
            found[part] = checks[part]()
            progress(f"  {found[part]}")
        local.resources.pool.check_integrity([])
        numerics = local.resources.fingerprint["numerics"].partition("/")[0]
    finally:
        local.resources.close()
    return {
        "ok": all(part["ok"] for part in found.values()), "numerics": numerics, "drafters": list(drafters),
        "random_heads": list(random_heads), "structures": [name for name, *_ in STRUCTURES],
        "answers": sum(part["answers"] for part in found.values()),
        "invalid": sum(part.get("invalid", 0) for part in found.values()),
        "different": sum(part.get("different", 0) for part in found.values()),
        "example": tokenizer.decode(plain[0]), "parts": found,
    }  # fmt: skip


def requests_for(tokenizer: Tokenizer, seeds: int) -> list[GenerateRequest]:
    """Each structure, greedy and sampled."""
    found = []
    for name, question, structure in STRUCTURES:
        ids = tuple(tokenizer.apply_chat([{"role": "user", "content": question}]))
        for seed in range(seeds):
            for temperature in (0.0, 0.9)[seed > 0 :]:  # greedy answers do not depend on the seed
                sampling = SamplingParams(
                    temperature=temperature,
                    seed=seed,
                    max_tokens=_LONGEST,
                    **structure,  # type: ignore[arg-type]
                )
                key = f"{name}-{temperature}-{seed}"
                found.append(GenerateRequest(request_id=key, prompt_ids=ids, sampling=sampling))
    return found


def valid(sampling: SamplingParams, text: str) -> bool:
    """Whether ``text`` is what was asked for, by other means than the grammar's."""
    if sampling.regex:
        return re.fullmatch(sampling.regex, text) is not None
    if sampling.choice:
        return text in sampling.choice
    try:
        jsonschema.validate(json.loads(text), json.loads(sampling.json_schema))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def answered(local: LocalGenerator, requests: Sequence[GenerateRequest]) -> Answers:
    """In this process, in batches."""
    found: list[list[int]] = [[] for _ in requests]
    for start in range(0, len(requests), CONCURRENT):
        for index, chunk in local.generate_batch(requests[start : start + CONCURRENT]):
            found[start + index] += chunk.token_ids
    return [tuple(answer) for answer in found]


def _judged(tokenizer: Tokenizer, requests: Sequence[GenerateRequest], answers: Answers) -> dict[str, Any]:
    wrong = [
        tokenizer.decode(answer) for request, answer in zip(requests, answers, strict=True)
        if not valid(request.sampling, tokenizer.decode(answer)) or answer[-1] not in tokenizer.eos_ids
    ]  # fmt: skip
    return {"ok": not wrong, "answers": len(answers), "invalid": len(wrong), "examples": wrong[:3]}


def _families(
    local: LocalGenerator, tokenizer: Tokenizer, requests: Sequence[GenerateRequest], plain: Answers,
    drafters: Sequence[str], progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    by_tree, count, invalid = {}, 0, 0
    for name in drafters:
        for tree in trees_of(local.resources.drafters[name], local.resources.config.plugins):
            asked = [replace(request, drafter=name, tree=tree) for request in requests]
            answers = answered(local, asked)
            by_tree[f"{name} {tree}".strip()] = sum(a != b for a, b in zip(answers, plain, strict=True))
            invalid += _judged(tokenizer, requests, answers)["invalid"]
            count += len(answers)
            progress(f"  {name} {tree}: {by_tree[f'{name} {tree}'.strip()]} of {len(answers)} answers differ")
    different = sum(by_tree.values())
    return {"ok": not different and not invalid, "answers": count, "different": different, "invalid": invalid,
            "by_tree": by_tree}  # fmt: skip


def _ratio(
    local: LocalGenerator, tokenizer: Tokenizer, requests: Sequence[GenerateRequest], drafters: Sequence[str]
) -> dict[str, Any]:
    """Sampled answers alone: greedy ones are coupled, whatever they ask for."""
    asked = [
        replace(one, drafter=name, sampling=replace(one.sampling, verify=verify.value))
        for name in drafters for verify in (Verify.REJECTION, Verify.BLOCK)
        for one in requests if one.sampling.temperature > 0
    ]  # fmt: skip
    return _judged(tokenizer, asked, answered(local, asked))


def _replay(
    local: LocalGenerator, requests: Sequence[GenerateRequest], plain: Answers, drafters: Sequence[str]
) -> dict[str, Any]:
    """Families take turns over the places at which an answer breaks."""
    asked: list[GenerateRequest] = []
    expected: Answers = []
    for request, answer in zip(requests, plain, strict=True):
        for sent in range(1, len(answer)):
            sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - sent)
            drafter = drafters[len(asked) % len(drafters)]
            asked.append(replace(
                request, prompt_ids=(*request.prompt_ids, *answer[:sent]), replayed=sent, sampling=sampling,
                drafter=drafter,
            ))  # fmt: skip
            expected.append(answer[sent:])
    different = sum(a != b for a, b in zip(answered(local, asked), expected, strict=True))
    return {"ok": different == 0, "answers": len(asked), "different": different}


def _handoff(
    config: WorkerConfig, requests: Sequence[GenerateRequest], plain: Answers, drafters: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    count = different = 0
    with Stack(config, progress=progress) as stack:
        for name in drafters:
            for handoff in HANDOFFS:
                answers = served(stack.endpoint, requests, drafter=name, tree="", handoff=handoff)
                different += sum(a != b for a, b in zip(answers, plain, strict=True))
                count += len(answers)
    return {"ok": different == 0, "answers": count, "different": different}
