"""The budget's policy against brute force, and the tables that it reads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec.config import WorkerConfig
from pdspec.engine.budget import best_budget, best_depth, best_nodes, profile
from pdspec.engine.resources import load
from pdspec.engine.steptimes import DraftTimes, VerifyTimes, measure
from pdspec.spec.protocol import Draft

STAIRS = VerifyTimes(rows=np.array([1, 2, 4, 8, 16]), seconds=np.array([10.0, 10.0, 11.0, 13.0, 21.0]) / 1e3)


def draft_of(random: np.random.Generator, nodes: int) -> Draft:
    parents = np.array([random.integers(-1, node) for node in range(nodes)], np.int32)
    survival = np.empty(nodes, np.float32)
    for node, parent in enumerate(parents):
        chance = random.choice([0.1, 0.5, 0.9, 1.0])
        survival[node] = chance * (1.0 if parent < 0 else survival[parent])
    return Draft(token_ids=np.arange(nodes, dtype=np.int32), parents=parents, survival=survival,
                 log_q=np.zeros(nodes, np.float32))


def closed_sets(draft: Draft) -> list[tuple[int, ...]]:
    every = itertools.chain.from_iterable(
        itertools.combinations(range(draft.num_nodes), size) for size in range(draft.num_nodes + 1)
    )
    return [kept for kept in every if all(draft.parents[node] < 0 or draft.parents[node] in kept for node in kept)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(0, 3), st.floats(0, 0.02))
def test_the_nodes_chosen_are_the_best_of_all_sets_of_nodes(seed, count, more, draft_s):
    random = np.random.default_rng(seed)
    drafts = [draft_of(random, int(random.integers(0, 4))) for _ in range(count)]
    tokens, rows = count + more, count + 2 * more

    def goodput(kept: list) -> float:
        survival = sum(float(draft.survival[list(nodes)].sum()) for draft, nodes in zip(drafts, kept, strict=True))
        return (tokens + survival) / (draft_s + float(STAIRS.at(rows + sum(map(len, kept)), 100)))

    kept = best_nodes(drafts, tokens, rows, draft_s, lambda asked: STAIRS.at(asked, 100))
    for draft, nodes in zip(drafts, kept, strict=True):
        assert all(draft.parents[node] < 0 or draft.parents[node] in nodes for node in nodes)
    best = max(goodput(list(sets)) for sets in itertools.product(*map(closed_sets, drafts)))
    assert goodput([nodes.tolist() for nodes in kept]) == pytest.approx(best, rel=1e-6)


def test_a_staircase_is_searched_to_its_end():
    def costs(rows):  # five rows cost what two do not: a search that stops at the first loss would miss them
        return np.where(np.asarray(rows) <= 1, 0.010, np.where(np.asarray(rows) <= 6, 0.016, 0.1))

    survival = np.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.4], np.float32)
    assert best_budget(1, 1, survival, 0.0, costs).nodes == 5
    assert best_budget(1, 1, survival[:1], 0.0, costs).nodes == 0
    assert best_budget(1, 1, np.empty(0, np.float32), 0.01, costs).goodput == pytest.approx(1 / 0.02)


def test_drafting_that_costs_more_than_it_gives_is_not_done():
    prospects = [np.array([[0.8], [0.7], [0.6]], np.float32)] * 2
    none = np.empty(0, np.float32)

    def chosen(draft_ms: float, tokens: int = 2) -> int:
        seconds = draft_ms * np.arange(4) / 1e3
        return best_depth(prospects, none, tokens, tokens, seconds, lambda rows: STAIRS.at(rows, 0))[0]

    assert [chosen(cost) for cost in (0.0, 5.0, 50.0)] == [3, 1, 0]  # six rows more, two, none
    assert chosen(0.0, tokens=64) == 0  # others fill the rows: one more costs as much as it gives
    with_others = np.full(12, 0.9, np.float32)  # another family's nodes fill the stairs first
    seconds = np.array([0.0, 0.004, 0.008, 0.012])
    assert best_depth(prospects, with_others, 2, 2, seconds, lambda rows: STAIRS.at(rows, 0))[0] == 0


def test_a_profile_is_the_survival_of_each_depth_best_first():
    draft = Draft(token_ids=np.arange(5, dtype=np.int32), parents=np.array([-1, -1, 0, 1, 2], np.int32),
                  log_q=np.zeros(5, np.float32), survival=np.array([0.4, 0.5, 0.1, 0.3, 0.05], np.float32))
    expected = [[0.5, 0.4, 0], [0.3, 0.1, 0], [0.05, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(profile(draft, 4, 3), expected, rtol=1e-6)
    np.testing.assert_allclose(profile(draft, 1, 1), [[0.5]])


def test_times_are_a_staircase_that_steps_correct():
    assert STAIRS.at([1, 3, 4, 9, 32], 0).tolist() == pytest.approx([0.010, 0.011, 0.011, 0.021, 0.042])
    slow = STAIRS
    for _ in range(200):
        slow = slow.corrected(4, 0, 0.022)
    assert float(slow.at(4, 0)) == pytest.approx(0.022, rel=0.01)
    assert float(slow.at(1, 0)) > 0.015  # the machine is slower, not these rows alone
    assert float(STAIRS.corrected(4, 0, 60.0).at(4, 0)) < 0.012  # one step that was held up
    again = VerifyTimes.from_json(STAIRS.to_json())
    assert np.array_equal(again.at(np.arange(1, 20), 7), STAIRS.at(np.arange(1, 20), 7))


def test_draft_times_are_learned():
    times = DraftTimes.none()
    assert times.at([1, 4], 8).tolist() == [0, 0]
    for depth, sequences in itertools.product((1, 2, 4), (1, 8)):
        times = times.corrected(depth, sequences, 0.001 + 0.002 * depth + 0.0005 * depth * sequences)
    assert times.at([3], 4)[0] == pytest.approx(0.013, rel=0.1)
    again = DraftTimes.from_json(times.to_json())
    assert np.array_equal(again.at([1, 2], 3), times.at([1, 2], 3))


def test_a_worker_measures_its_steps_and_gives_the_pages_back():
    resources = load(WorkerConfig(model="tiny", drafters=("none",), drafter="none", cache_tokens=1024, threads=1))
    try:
        times = measure(resources)
        resources.pool.check_integrity([])
        assert times.rows[0] == 1 and times.rows[-1] > 64 and (np.diff(times.seconds) >= 0).all()
        assert times.seconds[0] > 0 and times.kv_seconds >= 0
    finally:
        resources.close()
