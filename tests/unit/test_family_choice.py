"""``combined`` under ``budget: goodput``: repetitive answers go to suffix, novel ones to the head or to nobody, answers
stay those of plain decoding, and a head that others drafted for drafts as if they had not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pdspec.config import WorkerConfig
from pdspec.engine import choosing
from pdspec.engine.families import HEAD, NOBODY, SUFFIX
from pdspec.engine.local import LocalGenerator
from pdspec.engine.speculation import FixedBudget, GoodputBudget
from pdspec.engine.steptimes import DraftTimes, VerifyTimes
from pdspec.types import DraftTrace, GenerateRequest, SamplingParams

TOKENS = 160
NOVEL = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=1.5, seed=0)
REPETITIVE = replace(NOVEL, allowed_ids=(7,))  # which no drafter is told
FREE = VerifyTimes(rows=np.array([1, 999]), seconds=np.array([1.0, 1.0]))
STEPS = VerifyTimes(rows=np.arange(1, 99), seconds=1.0 + 0.1 * np.arange(1, 99))


def times(depth_s: float, *, row_s: float = 0.02) -> dict[str, DraftTimes]:
    """Seconds of the head by depth, and of a row that it catches up with."""
    learned = {"combined": DraftTimes.none(), "combined catches up": DraftTimes.none()}
    for depth in range(1, 9):
        learned["combined"] = learned["combined"].corrected(depth, 1, depth_s * depth)
        learned["combined catches up"] = learned["combined catches up"].corrected(depth, 1, row_s * depth)
    return learned


@pytest.fixture(scope="module", params=["draft_model", "eagle3"])
def local(request) -> Iterator[LocalGenerator]:
    """With the target itself for a head, or with a random one, which the shared noise makes right now and then."""
    generator = LocalGenerator(WorkerConfig(
        model="tiny", heads={"draft_model": "tiny", "eagle3": "random:3"}, drafter="none", cache_tokens=8192, threads=1,
        drafters=("none", "draft_model", "eagle3", "combined"), options={"combined:head": request.param}, poison=True,
        dtype="float32", survival="online",
    ))  # fmt: skip
    yield generator
    generator.resources.pool.check_integrity([])
    generator.resources.close()


def run(local: LocalGenerator, budget: FixedBudget, params: SamplingParams, drafter: str, tree: str = ""):
    """The answer, and its drafts by the position of their root."""
    local.decode.budget = budget
    request = GenerateRequest(
        request_id="r", drafter=drafter, tree=tree, trace=True, sampling=params,
        prompt_ids=tuple((5 * j * j + j) % 256 for j in range(20)),
    )  # fmt: skip
    tokens, traces = list[int](), dict[int, DraftTrace]()
    for chunk in local.generate(request):
        if chunk.trace:
            traces[chunk.start] = chunk.trace
        tokens += chunk.token_ids
    return tokens, traces


def goodput(local: LocalGenerator, verify: VerifyTimes, depth_s: float) -> GoodputBudget:
    return GoodputBudget(local.resources, verify_times=verify, draft_times=times(depth_s), frozen=True)


def choices(local: LocalGenerator, params: SamplingParams, depth_s: float) -> dict[str, float]:
    """Share of the verifications that each family drafted for; the answer is plain decoding's."""
    plain, _ = run(local, FixedBudget(local.resources), params, "none")
    metrics = local.resources.metrics
    budget = goodput(local, STEPS, depth_s)
    before = {name: metrics[f"family_{name}"] for name in (SUFFIX, HEAD, NOBODY)}
    tokens, _ = run(local, budget, params, "combined")
    assert tokens == plain
    counted = {name: metrics[f"family_{name}"] - before[name] for name in before}
    return {name: count / sum(counted.values()) for name, count in counted.items()}


def test_a_repetitive_sequence_moves_to_suffix_and_a_novel_one_does_not(local):
    repetitive, novel = choices(local, REPETITIVE, 0.1), choices(local, NOVEL, 0.1)
    assert repetitive[SUFFIX] > 0.6, repetitive
    assert novel[HEAD] > 0.7 and novel[SUFFIX] < 0.2, novel


def test_where_the_head_takes_too_long_a_novel_sequence_is_decoded_plainly(local):
    found = choices(local, replace(NOVEL, seed=1), 9.0)  # an answer that suffix has not seen before
    assert found[NOBODY] > 0.7 and found[HEAD] < 0.05, found
    assert choices(local, REPETITIVE, 9.0)[SUFFIX] > 0.6


@pytest.mark.parametrize("params", [replace(NOVEL, temperature=0.0), NOVEL], ids=["greedy", "sampled"])
def test_the_head_drafts_as_if_nobody_else_had(local, monkeypatch, params):
    """Families change at random; where the head drafts, it drafts what it always would have."""
    name = local.resources.config.options["combined:head"]
    random, told = np.random.default_rng(5), list[str]()

    def whimsical(offers, *rest) -> list[str]:
        told.append(str(random.choice([SUFFIX, HEAD, NOBODY])))
        return [told[-1]]

    monkeypatch.setattr(choosing, "choose", whimsical)
    always_tokens, always = run(local, FixedBudget(local.resources), params, name, "chain(3)")
    tokens, traces = run(local, goodput(local, FREE, 0.0), params, "combined", "chain(3)")
    assert tokens == always_tokens and len(set(told)) == 3
    compared = 0
    for family, (start, trace) in zip(told, sorted(traces.items()), strict=False):
        if family == NOBODY:
            assert not trace.token_ids
        if family == HEAD and start in always:
            depth = min(len(trace.token_ids), len(always[start].token_ids))
            assert depth and trace.token_ids[:depth] == always[start].token_ids[:depth]
            compared += 1
        elif family == HEAD and name == "draft_model":
            assert trace.accepted == len(trace.token_ids) > 0
            compared += 1
    assert compared >= 5


def test_rejection_ends_whatever_is_chosen(local):
    tokens, _ = run(local, goodput(local, STEPS, 0.1), replace(NOVEL, verify="rejection"), "combined")
    assert len(tokens) == TOKENS


def test_a_head_that_is_too_far_behind_is_cold_and_suffix_goes_on(local, monkeypatch):
    monkeypatch.setattr(choosing, "choose", lambda offers, *rest: [SUFFIX] * len(offers))
    monkeypatch.setattr(local.resources, "config", local.resources.config.replace(draft_queue=3))
    cold = local.resources.metrics.get("draft_cold", 0.0)
    tokens, traces = run(local, goodput(local, FREE, 0.0), REPETITIVE, "combined")
    assert tokens == [7] * TOKENS and local.resources.metrics["draft_cold"] == cold + 1
    assert len(traces) < TOKENS / 2, "suffix still drafts"
