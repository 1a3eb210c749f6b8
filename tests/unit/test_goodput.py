"""The goodput budget in the engine: the same answers whatever it decides, and drafters left behind catch up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.engine.speculation import FixedBudget, GoodputBudget
from pdspec.engine.steptimes import DraftTimes, VerifyTimes
from pdspec.spec.registry import NAMES
from pdspec.types import DraftTrace, GenerateRequest, SamplingParams

TOKENS = 28
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.95)
FREE = VerifyTimes(rows=np.array([1, 999]), seconds=np.array([1.0, 1.0]))
DEAR = VerifyTimes(rows=np.arange(1, 99), seconds=np.arange(1, 99.0))  # a row costs as much as its token is worth


@pytest.fixture(scope="module")
def local() -> Iterator[LocalGenerator]:
    heads = {name: "random:3" for name in NAMES if name != "none"} | {"draft_model": "tiny"}
    generator = LocalGenerator(WorkerConfig(
        model="tiny", heads=heads, drafters=NAMES, drafter="none", cache_tokens=16384, threads=1, poison=True,
        options={"mtp:modules": "3", "sparse:window": "4096"}, dtype="float32", draft_queue=30,
    ))
    yield generator
    generator.resources.pool.check_integrity([])
    generator.resources.close()


class Whimsical(GoodputBudget):
    """Drafts now and then, to a depth of its own, for some of a family's sequences only."""

    def _chosen(self, name, group, depth):
        random = np.random.default_rng([len(name), len(group), *(s.ctx.root_position for s in group)])
        chosen = [sequence for sequence in group if random.random() < 0.4]
        return chosen, int(random.integers(1, 4))


def run(local: LocalGenerator, budget: type[FixedBudget], params: SamplingParams, names, tree="", **options):
    """Tokens of each answer, and its drafts by the position of their root."""
    engine = local.decode
    engine.budget = budget(local.resources, **options)
    requests = [
        GenerateRequest(request_id=str(i), drafter=name, tree=tree, trace=True, sampling=replace(params, seed=i),
                        prompt_ids=tuple((5 * j * j + 3 * i + j) % 256 for j in range(12 + i)))
        for i, name in enumerate(names)
    ]
    tokens = [[] for _ in requests]
    traces: list[dict[int, DraftTrace]] = [{} for _ in requests]
    for index, chunk in local.generate_batch(requests):
        if chunk.trace:
            traces[index][chunk.start] = chunk.trace
        tokens[index] += chunk.token_ids
    return tokens, traces


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, replace(SAMPLED, verify="rejection")],
                         ids=["greedy", "sampled", "rejection"])
def test_answers_are_those_of_plain_decoding_whatever_the_budget_decides(local, params):
    names = [name for name in NAMES if name != "none"]
    if params.verify == "rejection":  # no answer is the same as plain decoding's: each must still come to its end
        tokens, _ = run(local, Whimsical, params, names, verify_times=FREE, frozen=True)
        assert all(len(one) == TOKENS for one in tokens)
        return
    plain, _ = run(local, FixedBudget, params, ["none"] * len(names))
    for budget, times in ((Whimsical, FREE), (GoodputBudget, FREE), (GoodputBudget, DEAR)):
        tokens, traces = run(local, budget, params, names, verify_times=times, frozen=True)
        assert tokens == plain
        verified = sum(len(trace.token_ids) for one in traces for trace in one.values())
        assert verified > 120 if times is FREE else verified < 40


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("none", "suffix", "combined", "lookahead")])
def test_a_drafter_that_was_left_behind_drafts_as_if_it_had_not_been(local, name):
    params = replace(GREEDY, temperature=0.8)
    _, always = run(local, FixedBudget, params, [name] * 3, tree="chain(3)")
    _, at_times = run(local, Whimsical, params, [name] * 3, tree="chain(3)", verify_times=FREE, frozen=True)
    compared = 0
    for every, some in zip(always, at_times, strict=True):
        for start, trace in some.items():
            if trace.token_ids and start in every:
                depth = min(len(trace.token_ids), len(every[start].token_ids))
                assert every[start].token_ids[:depth] == trace.token_ids[:depth]
                compared += 1
    assert compared >= 3
    if name in ("draft_model", "sparse"):  # it is the target, or sees all that the target sees
        assert all(trace.accepted == len(trace.token_ids) for one in at_times for trace in one.values())


def test_no_budget_runs_no_drafter_but_probes(local):
    names = ["eagle3"] * 3
    metrics = local.resources.metrics
    before = dict(metrics)
    _tokens, _traces = run(local, GoodputBudget, replace(GREEDY, max_tokens=120), names, verify_times=DEAR, frozen=True,
                         draft_times={"eagle3": DraftTimes.none().corrected(1, 3, 5.0)})
    drafted = metrics["budget_nodes_drafted"] - before.get("budget_nodes_drafted", 0)
    assert metrics["budget_nodes_verified"] == before.get("budget_nodes_verified", 0)
    assert metrics["budget_plain_steps"] - before.get("budget_plain_steps", 0) > 100
    assert metrics["budget_probes"] - before.get("budget_probes", 0) >= 1 and 0 < drafted < 30
    assert metrics["draft_cold"] - before.get("draft_cold", 0) == 3  # 30 plain steps and no probe


def test_what_is_chosen_depends_on_the_tables_alone(local):
    names = ["eagle3", "mtp", "medusa"]
    steps = VerifyTimes(rows=np.array([1, 3, 6, 99]), seconds=np.array([1.0, 1.1, 1.2, 9.0]))
    first = run(local, GoodputBudget, SAMPLED, names, verify_times=steps, frozen=True)
    assert first == run(local, GoodputBudget, SAMPLED, names, verify_times=steps, frozen=True)
    assert max(len(trace.token_ids) for one in first[1] for trace in one.values()) <= 3
