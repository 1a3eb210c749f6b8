"""Continuous batching: every row keeps its own accepted length, and nobody's answer depends on the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.spec.protocol import Draft, DraftContext
from pdspec.spec.registry import NAMES, family
from pdspec.types import DraftTrace, GenerateRequest, SamplingParams, TokenChunk

K, ROUNDS, TOKENS = 4, 5, 40
HEADS = {"draft_model": "tiny-2"}
SAMPLING = {
    "greedy": SamplingParams(max_tokens=TOKENS, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.8, top_p=0.95),
    "penalised": SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.9, repetition_penalty=1.3,
                                frequency_penalty=0.2, logprobs=1),
}  # fmt: skip


class Foretold:
    """Knows the answers: its chain of K is right in as many places as the request's number and round say, so that the
    rows of a batch accept 0, 1, … K nodes, each another count, in every step."""

    name, groups, capture, want_final, max_nodes, default_tree = "foretold", (), (), False, K, f"chain({K})"

    def __init__(self) -> None:
        self.answers: dict[str, list[int]] = {}

    def fingerprint(self) -> str:
        return self.name

    def depth(self, tree: str) -> int:
        return K

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        return {}

    def prefill(self, ctx: DraftContext, hidden: Any) -> None:
        ctx.state = int(ctx.request_id)

    def start(self, ctx: DraftContext) -> tuple[None, dict[str, Any]]:
        return None, {}

    def resume(self, ctx: DraftContext, candidates: Any, rows: Any) -> None:
        pass

    def propose(self, batch: list[DraftContext], budgets: list[int]) -> list[Draft]:
        drafts = []
        for ctx in batch:
            tokens = self.answers[ctx.request_id][len(ctx.token_ids) - ctx.prompt_len :][:K]
            chain = np.array(tokens, np.int32)
            chain[ctx.state % (K + 1) :] ^= 1
            drafts.append(Draft(token_ids=chain, parents=np.arange(-1, len(chain) - 1, dtype=np.int32),
                                log_q=np.full(len(chain), np.nan, np.float32),
                                survival=np.ones(len(chain), np.float32)))
        return drafts

    def observe(self, batch: list[Any]) -> None:
        for ctx, _, _ in batch:
            ctx.state += 1


@pytest.fixture(scope="module")
def local() -> Iterator[LocalGenerator]:
    heads = {name: HEADS.get(name, "random:3") for name in NAMES if name != "none"}
    generator = LocalGenerator(WorkerConfig(
        model="tiny", heads=heads, drafters=NAMES, drafter="none", cache_tokens=16384, threads=1, poison=True,
        options={"mtp:modules": "3"},
        dtype="float32",
    ))  # fmt: skip
    generator.resources.drafters["foretold"] = Foretold()
    yield generator
    generator.resources.pool.check_integrity([])
    generator.resources.close()


def ask(number: int, params: SamplingParams, drafter: str, tree: str = "") -> GenerateRequest:
    ids = tuple((7 * i * i + 11 * number + i) % 256 for i in range(9 + 3 * number))
    return GenerateRequest(request_id=str(number), prompt_ids=ids, drafter=drafter, tree=tree, trace=True,
                           sampling=replace(params, seed=50 + number))


def run(local: LocalGenerator, requests: list[GenerateRequest]) -> list[list[TokenChunk]]:
    chunks: list[list[TokenChunk]] = [[] for _ in requests]
    for index, chunk in local.generate_batch(requests):
        chunks[index].append(replace(chunk, stats=None))
    return chunks


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_rows_that_accept_different_counts_in_one_step_are_as_one_at_a_time(params, local):
    requests = [ask(number, params, "foretold") for number in range(K + 1)]
    plain = [tokens_of(chunks) for chunks in run(local, [replace(one, drafter="none") for one in requests])]
    local.resources.drafters["foretold"].answers = {one.request_id: a for one, a in zip(requests, plain, strict=True)}
    together, alone = run(local, requests), [run(local, [one])[0] for one in requests]
    assert [tokens_of(chunks) for chunks in together] == plain
    assert together == alone  # chunks, traces and log probabilities, too
    for step in range(1, ROUNDS + 1):
        accepted = [trace.accepted for chunks in together if isinstance(trace := chunks[step].trace, DraftTrace)]
        assert sorted(accepted) == list(range(K + 1))  # 1 … K + 1 tokens


@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_families_and_trees_mixed_in_one_batch_are_as_one_at_a_time(params, local):
    trees = {"chain": "chain(2)", "static": "static(2x2)", "dynamic": "dynamic(2,3,6)"}
    cases = [(name, trees.get(kind, "")) for name in NAMES for kind in family(name).DESCRIPTION.trees or ("",)]
    requests = [ask(number, params, *case) for number, case in enumerate(cases)]
    plain = [tokens_of(chunks) for chunks in run(local, [replace(one, drafter="none", tree="") for one in requests])]
    together = run(local, requests)
    assert [tokens_of(chunks) for chunks in together] == plain
    for chunks, one in zip(together, requests, strict=True):
        (alone,) = run(local, [one])
        assert [p for c in chunks for p in c.logprobs] == [p for c in alone for p in c.logprobs]
        assert tokens_of(chunks) == tokens_of(alone)
        if one.drafter not in ("suffix", "combined"):  # which remember what others were answered
            assert chunks == alone
