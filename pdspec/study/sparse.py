"""``pdspec study sparse``: MagicDec's regime, where a batch's KV is more to read than the weights are.

The prompts are prefilled once. Then plain decoding and the target's own sparse drafts take turns over the same pages:
each turn starts at the same root, and going back is lowering a length. So every ratio is of neighbours in time.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from pdspec.cache.pool import pages_for
from pdspec.config import WorkerConfig
from pdspec.engine.decode import DecodeEngine
from pdspec.engine.local import Kept, LocalGenerator, new_context
from pdspec.engine.prefill import PrefillSequence, prompt_history
from pdspec.engine.sequence import DecodeSequence
from pdspec.errors import PdspecError
from pdspec.study.machine import read_bandwidth, weight_bytes
from pdspec.study.ways import Progress, prompt_ids
from pdspec.telemetry import usable_cores
from pdspec.types import DraftPrefill, GenerateRequest, SamplingParams

FAMILY = "sparse"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One way of decoding for some tokens: rates over all sequences together."""

    tokens_per_second: float
    acceptance_length: float
    step_ms: float
    tokens: tuple[tuple[int, ...], ...]


def run(
    *, worker: dict[str, Any], sequences: int, context: int, tokens: int, rounds: int, trees: Sequence[str],
    prompts: str | None, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``sequences`` prompts of ``context`` tokens; each way writes ``tokens`` tokens to each, ``rounds`` times.
    ``ratio``: of the best tree's tokens per second to plain decoding's, median of the rounds. Raises ConfigError."""
    room = sequences * (context + tokens + 96)
    config = WorkerConfig.from_mapping(
        {"cache_tokens": room, **worker, "drafter": FAMILY, "drafters": ("none", FAMILY)}
    )
    generator = LocalGenerator(config)
    try:
        texts = long_prompts([list(ids) for ids in prompt_ids(config, prompts, 0)], sequences, context)
        began = time.perf_counter()
        prepared = [_prefilled(generator, ids, tokens) for ids in texts]
        progress(f"{sequences} prompts of {context} tokens prefilled in {time.perf_counter() - began:.0f} s")
        ways = [("none", ""), *((FAMILY, tree) for tree in trees)]
        turns: dict[tuple[str, str], list[Turn]] = {way: [] for way in ways}
        for index in range(rounds):
            for way in (*ways[index % len(ways) :], *ways[: index % len(ways)]):
                turns[way].append(_turn(generator, prepared, *way))
            shown = ", ".join(f"{' '.join(way)} {found[-1].tokens_per_second:.1f}" for way, found in turns.items())
            progress(f"round {index + 1} of {rounds}, tokens/s: {shown}")
        return _summary(generator, turns, config, sequences, context)
    finally:
        generator.resources.close()


def long_prompts(prompts: Sequence[Sequence[int]], count: int, length: int) -> list[tuple[int, ...]]:
    """``count`` prompts of ``length`` tokens: all prompts one after the other, each time beginning with another one."""
    found = []
    for index in range(count):
        start = index * len(prompts) // count
        ids = [token for prompt in (*prompts[start:], *prompts[:start]) for token in prompt]
        found.append(tuple((ids * (length // len(ids) + 1))[:length]))
    return found


Prepared = tuple[DecodeSequence, Kept]


def _prefilled(generator: LocalGenerator, ids: tuple[int, ...], tokens: int) -> Prepared:
    resources = generator.resources
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0)
    request = GenerateRequest(request_id="long", prompt_ids=ids, sampling=params, drafter=FAMILY)
    ctx = new_context(resources, request, [])
    drafter = resources.drafter(FAMILY)
    rows = generator.decode.rows_needed(request, drafter, ctx.tree)
    ctx.pages = resources.pool.allocate(pages_for(rows, resources.pool.page_size))
    kept = Kept()
    prompt = PrefillSequence(
        request=request, ctx=ctx, drafter=drafter, draft_prefill=DraftPrefill.PREFILL, events=kept, ship_rows=False
    )
    while not prompt.finished:
        generator.prefill.step([(prompt, min(resources.config.chunk, prompt.remaining))])
    history = prompt_history(request, resources.grammars).extended(ctx.token_ids[-1:])
    return DecodeSequence(request=request, ctx=ctx, drafter=drafter, history=history), kept


def _turn(generator: LocalGenerator, prepared: Sequence[Prepared], drafter: str, tree: str) -> Turn:
    """All sequences from their roots to their last tokens, in one batch."""
    resources, running = generator.resources, []
    engine = DecodeEngine(resources)
    for sequence, kept in prepared:
        ctx = copy.copy(sequence.ctx)
        ctx.token_ids, ctx.tree, ctx.state = list(ctx.token_ids), tree, None
        chosen = resources.drafter(drafter)
        request = dataclasses.replace(sequence.request, drafter=drafter, tree=tree)
        one = DecodeSequence(request=request, ctx=ctx, drafter=chosen, history=sequence.history)
        chosen.resume(ctx, *kept.begun)
        running.append(one)
    every = list(running)
    began = time.perf_counter()
    while running:
        for _, result in engine.step(running):
            if isinstance(result, PdspecError):
                raise result
        running = [one for one in running if one.finish is None]
    seconds = time.perf_counter() - began
    written = [tuple(one.ctx.token_ids[one.ctx.prompt_len :]) for one in every]
    count = sum(len(answer) - 1 for answer in written)
    return Turn(
        tokens_per_second=count / seconds, acceptance_length=count / sum(one.verifications for one in every),
        step_ms=1e3 * seconds / engine.steps, tokens=tuple(written),
    )


def _summary(
    generator: LocalGenerator, turns: dict[tuple[str, str], list[Turn]], config: WorkerConfig, sequences: int,
    context: int,
) -> dict[str, Any]:  # fmt: skip
    plain = turns["none", ""]
    group, model = generator.resources.runner.group, generator.resources.files.config
    kv = sequences * context * group.row_bytes * group.num_layers
    weights = weight_bytes(model, config.dtype)
    bandwidth = read_bandwidth(config.threads or usable_cores())
    rows: list[dict[str, Any]] = []
    for (drafter, tree), found in turns.items():
        ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(found, plain, strict=True)]
        rows.append({
            "drafter": drafter, "tree": tree, "speedup_over_none": statistics.median(ratios),
            **{name: statistics.median(getattr(turn, name) for turn in found) for name in _RATES},
        })  # fmt: skip
    same = all(turn.tokens == plain[0].tokens for found in turns.values() for turn in found)
    best = max((row for row in rows if row["drafter"] != "none"), key=lambda row: row["speedup_over_none"])
    return {
        "ok": same and best["speedup_over_none"] > 1.0, "same_tokens": same, "ratio": best["speedup_over_none"],
        "rows": rows, "sequences": sequences, "context": context, "kv_bytes": kv, "weight_bytes": weights,
        "floor_step_ms": 1e3 * (kv + weights) / bandwidth, "read_bytes_per_second": bandwidth,
        "options": dict(config.options),
    }  # fmt: skip


_RATES = ("tokens_per_second", "acceptance_length", "step_ms")
