"""``pdspec study wire-kv``: what rounding target KV on the wire (``wire_kv: int8``, lossy) saves and what it changes.

* rows: bytes that crossed the handoff, acceptance, and how far answers agree with those of whole KV: under coupled
  sampling the drafter changes nothing, so those are plain decoding's.
* scores: the plain greedy answers fed back behind each prompt, over whole and over rounded rows of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pdspec.config import WIRE_KVS, WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.engine.prefill import page_table
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.spec.registry import family
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.pair import Pair, Traced
from pdspec.study.ways import Progress, Prompts, Way, prompt_ids
from pdspec.transfer.lossy import decode, encode
from pdspec.types import GenerateRequest, GenerationStats, SamplingParams

WHOLE, ROUNDED = WIRE_KVS
Answers = dict[tuple[str, Way], list[Traced]]


def run(
    *, worker: Mapping[str, Any], drafters: Sequence[str], temperatures: Sequence[float], prompts: str | None,
    num_prompts: int, max_tokens: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The whole study. ``ok``: against the rounded rows all drafters wrote the same tokens. Raises ConfigError for
    fewer than two tokens an answer (no KV would travel)."""
    if max_tokens < 2:
        raise ConfigError(f"{max_tokens} tokens need no KV", field="max_tokens", remedy="ask for 2 or more")
    config, random_heads = with_random_heads(worker_config({"numerics": "fast", **worker}, drafters))
    ids = prompt_ids(config, prompts, num_prompts)
    ways = [
        Way(drafter=name, tree=family(name).DESCRIPTION.default_tree, temperature=temperature)
        for temperature in temperatures for name in dict.fromkeys(("none", *drafters))
    ]  # fmt: skip
    answers = _behind_the_handoff(config, ways, ids, max_tokens, progress)
    rows = [_row(wire, way, found, answers[WHOLE, way]) for (wire, way), found in answers.items()]
    plain = {way.temperature: found for (wire, way), found in answers.items()
             if wire == ROUNDED and way.drafter == "none"}  # fmt: skip
    moved = {wire: sum(row["kv_bytes"] for row in rows if row["wire_kv"] == wire) for wire in WIRE_KVS}
    return {
        "ok": all(_tokens(found) == _tokens(plain[way.temperature]) for (wire, way), found in answers.items()
                  if wire == ROUNDED),
        "lossy": ROUNDED, "prompts": len(ids), "prompt_tokens": sum(map(len, ids)), "max_tokens": max_tokens,
        "random_heads": list(random_heads), "bytes_ratio": moved[ROUNDED] / moved[WHOLE], "rows": rows,
        "scores": _scores(config, ids, max_tokens, progress),
    }  # fmt: skip


def _behind_the_handoff(
    config: WorkerConfig, ways: Sequence[Way], ids: Prompts, max_tokens: int, progress: Progress
) -> Answers:
    found: Answers = {}
    for wire in WIRE_KVS:
        with Pair(config.replace(wire_kv=wire)) as pair:
            for way in ways:
                found[wire, way] = pair.ask(way.requests(ids, max_tokens), concurrent=1)
                progress(f"wire_kv {wire}: {way}")
    return found


def _row(wire: str, way: Way, found: Sequence[Traced], whole: Sequence[Traced]) -> dict[str, Any]:
    stats = [answer.stats or GenerationStats() for answer in found]
    verifications = max(1, sum(one.verifications for one in stats))
    pairs = list(zip(_tokens(found), _tokens(whole), strict=True))
    return {
        "wire_kv": wire, "drafter": way.drafter, "tree": way.tree, "temperature": way.temperature,
        "acceptance_length": sum(one.output_tokens - 1 for one in stats) / verifications,
        "first_draft_accepted": sum(one.first_draft_accepted for one in stats) / len(stats),
        "kv_bytes": sum(one.kv_bytes for one in stats), "draft_kv_bytes": sum(one.draft_kv_bytes for one in stats),
        "transfer_exposed_ms": float(np.median([one.transfer_exposed_ms for one in stats])),
        "same_answers": float(np.mean([a == b for a, b in pairs])),
        "same_before_first_difference": float(np.mean([_common(a, b) / len(b) for a, b in pairs])),
    }  # fmt: skip


def _scores(config: WorkerConfig, ids: Prompts, max_tokens: int, progress: Progress) -> dict[str, Any]:
    """Differences of logits and of laws at every position of the plain answers behind their first token."""
    generator = LocalGenerator(config.replace(wire_kv=WHOLE))
    largest, divergences, same = 0.0, list[torch.Tensor](), list[torch.Tensor]()
    try:
        for index, prompt in enumerate(ids):
            whole, rounded = _logits(generator, index, prompt, max_tokens)
            largest = max(largest, float((whole - rounded).abs().max()))
            log_p, log_q = whole.log_softmax(-1), rounded.log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
            same.append(whole.argmax(-1) == rounded.argmax(-1))
        progress("scores over whole and rounded rows")
    finally:
        generator.resources.close()
    nats, best = torch.cat(divergences), torch.cat(same)
    return {
        "positions": len(best), "max_logit_difference": largest, "mean_kl_nats": float(nats.mean()),
        "max_kl_nats": float(nats.max()), "same_best_token": float(best.double().mean()),
    }  # fmt: skip


def _logits(
    generator: LocalGenerator, index: int, prompt: tuple[int, ...], max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 [max_tokens - 1, V] each: over the prompt's own rows, and over what rounding leaves of them."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)
    request = GenerateRequest(request_id=f"{index}", prompt_ids=prompt, drafter="none", sampling=params)
    answer = [token for chunk in generator.generate(request) for token in chunk.token_ids][:-1]
    held: list[list[int]] = []
    try:
        generator.begin(request, held)
        whole = _forward(generator, held[0], len(prompt), answer)
        _round(generator, held[0], len(prompt))
        return whole, _forward(generator, held[0], len(prompt), answer)
    finally:
        for pages in held:
            generator.resources.pool.release(pages)


def _forward(generator: LocalGenerator, pages: list[int], start: int, tokens: list[int]) -> torch.Tensor:
    slots = np.arange(start, start + len(tokens), dtype=np.int32)
    batch = ForwardBatch(
        token_ids=np.array(tokens, np.int32), positions=slots, sequence=np.zeros(len(tokens), np.int32), slots=slots,
        prefix_len=slots + 1, ancestors=np.empty((len(tokens), 0), np.int32), page_table=page_table([pages]),
        logit_rows=np.arange(len(tokens), dtype=np.int32),
    )  # fmt: skip
    return generator.resources.runner.forward(batch, generator.resources.cache).logits.clone().float()


def _round(generator: LocalGenerator, pages: list[int], count: int) -> None:
    """What a lossy handoff makes of a prompt's target rows."""
    cache, group = generator.resources.cache, generator.resources.runner.group
    for layer in range(group.num_layers):
        payload = encode(cache.row_views(group.name, layer, pages, 0, count), group, 0, count)
        rows = decode(payload, group, 0, count, group.num_kv_heads)
        cache.write_rows(group.name, layer, pages, 0, count, rows)


def _tokens(answers: Sequence[Traced]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
