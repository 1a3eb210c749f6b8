"""Suffix drafting against its definition: every substring is looked at, every continuation counted."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec.errors import InvalidRequest
from pdspec.spec.protocol import Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.suffix.drafter import LEAST_SURVIVAL, SuffixDrafter, grow
from pdspec.spec.suffix.tree import MAX_MATCH, MAX_PLACES, Match, RequestTree, SharedTree
from pdspec.types import SamplingParams

NO_ROWS = HiddenRows(start=0, captured=None, final=None)
TOKENS = st.lists(st.integers(0, 2), max_size=MAX_PLACES)  # so that no place is one too many


def context(tokens, tree="", prompt_len=None) -> DraftContext:
    return DraftContext(
        request_id="r", sampling=SamplingParams(), noise_key=(0, 0), token_ids=list(tokens), pages=[],
        prompt_len=len(tokens) if prompt_len is None else prompt_len, tree=tree,
    )  # fmt: skip


def propose(drafter, ctx, budget=8) -> Draft:
    (draft,) = drafter.propose([ctx], [budget])
    return draft


def answer(drafter, prompt, output) -> DraftContext:
    """A request that put out all of ``output``."""
    ctx = context(prompt)
    drafter.resume(ctx, *drafter.start(ctx))
    ctx.token_ids += output
    drafter.observe([(ctx, Verdict(path=(), output_ids=tuple(output)), NO_ROWS)])
    return ctx


def paths(draft) -> dict[tuple[int, ...], float]:
    """Each node as the tokens that lead to it, with its survival."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.token_ids.tolist(), draft.parents.tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return dict(zip(found, draft.survival.tolist(), strict=True))


def searched(sequences, suffix) -> tuple[int, list[tuple[int, int]]]:
    """The definition: (length, [(sequence, place)]) of the longest end of ``suffix`` with a token after it."""
    for length in range(min(MAX_MATCH, len(suffix)), 0, -1):
        wanted = suffix[len(suffix) - length :]
        places = [
            (number, end)
            for number, tokens in enumerate(sequences)
            for end in range(length - 1, len(tokens) - 1)
            if tokens[end - length + 1 : end + 1] == wanted
        ]
        if places:
            return length, places
    return 0, []


def rows(match) -> list[list[int]]:
    return sorted(match.continuations.tolist())


# --- the trees -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(TOKENS, st.lists(st.integers(1, 9), max_size=20), st.integers(1, 7))
def test_a_request_s_tree_finds_the_longest_match_and_all_its_places(tokens, strides, horizon):
    tree, known = RequestTree(), 0
    while known < len(tokens):
        stride = strides.pop() if strides else 1
        tree.extend(tokens[known : known + stride])
        known = min(known + stride, len(tokens))
        assert tree.num_tokens == known
        length, places = searched([tokens[:known]], tokens[:known])
        match = tree.match(horizon)
        expected = []
        for _, place in places:
            grown = tokens[:known]
            while len(grown) < known + horizon:  # a copy that reaches the end goes on with what it copied
                grown.append(grown[place + 1 + len(grown) - known])
            expected.append(grown[known:])
        assert match.length == length and rows(match) == sorted(expected)


EXTENSIONS = st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 2), max_size=9)), max_size=25)


@settings(max_examples=150, deadline=None)
@given(EXTENSIONS, TOKENS, st.integers(1, MAX_PLACES), st.integers(0, 5))
def test_the_shared_tree_counts_what_it_holds_and_drops_the_oldest_sequences_whole(extensions, suffix, bound, besides):
    tree, held = SharedTree(bound), {}
    for key, tokens in extensions:
        tree.extend(key, tokens)
        kept = tokens[-bound:]
        while sum(map(len, held.values())) + len(kept) > bound:
            del held[next(iter(held))]
        if kept:
            held[key] = held.get(key, []) + kept
        assert (tree.num_tokens, tree.num_sequences) == (sum(map(len, held.values())), len(held))
        length, places = searched(others := [held[key] for key in held if key != besides], suffix)
        match = tree.match(suffix, horizon=4, besides=besides)
        expected = [(others[number][end + 1 : end + 5] + [-1] * 4)[:4] for number, end in places]
        assert match.length == length and rows(match) == sorted(expected)


def test_long_matches_end_at_the_bound_and_of_many_places_the_last_count():
    tree = RequestTree()
    tree.extend([7, 8, 8, *[5] * 300])
    match = tree.match(3)
    assert match.length == MAX_MATCH and match.continuations.tolist() == [[5, 5, 5]] * MAX_PLACES
    shared = SharedTree(1000)
    shared.extend("old", [1, 9] * MAX_PLACES)
    shared.extend("new", [1, 3] * MAX_PLACES + [1])
    assert shared.match([4, 1], horizon=1).continuations.tolist() == [[3]] * MAX_PLACES
    assert shared.match([9, 1], horizon=1).length == 2


def test_the_shared_tree_needs_room_for_a_token():
    with pytest.raises(ValueError, match="0 tokens"):
        SharedTree(0)


# --- growing a draft -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=20),
    st.lists(st.integers(0, 4), min_size=20, max_size=20), st.integers(1, 4), st.integers(1, 12),
)  # fmt: skip
def test_the_most_frequent_continuations_are_drafted(continuations, ends, top_k, nodes):
    table = [row[:end] + [-1] * (4 - end) for row, end in zip(continuations, ends, strict=False)]
    grown = grow(Match(length=9, continuations=np.array(table, np.int32)), top_k=top_k, nodes=nodes)
    counts = Counter(tuple(row[:n]) for row in table for n in range(1, 5) if row[n - 1] >= 0)
    allowed: set[tuple[int, ...]] = set()
    for depth in range(1, 5):
        for parent in {path[:-1] for path in counts if len(path) == depth}:
            if parent and parent not in allowed:
                continue
            siblings = sorted((p for p in counts if p[:-1] == parent), key=lambda p: (-counts[p], p))[:top_k]
            allowed |= {p for p in siblings if counts[p] >= LEAST_SURVIVAL * len(table)}
    found = paths(grown.draft)
    assert len(found) == min(nodes, len(allowed)) and found.keys() <= allowed
    assert sorted(map(counts.get, found)) == sorted(sorted(map(counts.get, allowed), reverse=True)[: len(found)])
    assert all(value == pytest.approx(counts[path] / len(table)) for path, value in found.items())
    assert grown.score == pytest.approx(sum(found.values())) and np.isnan(grown.draft.log_q).all()


def test_equal_counts_go_to_the_shallower_node_and_then_to_the_lowest_token():
    draft = grow(Match(length=9, continuations=np.array([[6, 1], [2, 5], [4, 0]], np.int32)), top_k=2, nodes=3).draft
    assert draft.token_ids.tolist() == [2, 4, 0] and draft.parents.tolist() == [-1, -1, 1]


# --- the drafter -----------------------------------------------------------------------------------------------------


def test_branches_where_the_context_did_and_a_chain_takes_the_most_frequent():
    tokens = [1, 2, 3, 9, 1, 2, 4, 8, 1, 2, 3, 7, 1, 2]
    draft = propose(SuffixDrafter(), context(tokens, "dynamic(2,4,4)"))
    assert paths(draft) == {(3,): pytest.approx(2 / 3), (4,): pytest.approx(1 / 3), (3, 7): pytest.approx(1 / 3),
                            (4, 8): pytest.approx(1 / 3)}  # fmt: skip
    assert paths(propose(SuffixDrafter(), context(tokens, "chain(2)"))).keys() == {(3,), (3, 7)}


def test_longer_matches_are_trusted_further():
    for matched, expected in ((1, 2), (2, 4), (3, 6), (9, 8)):
        tokens = [*range(10, 10 + matched), *range(50, 70), *range(10, 10 + matched)]
        assert propose(SuffixDrafter(), context(tokens)).token_ids.tolist() == list(range(50, 50 + expected))
    assert propose(SuffixDrafter(alpha=0.5), context([1, 2, 1])).num_nodes == 1
    with pytest.raises(ValueError, match="alpha"):
        SuffixDrafter(alpha=0.0)


def test_loops_are_followed_beyond_the_end():
    assert propose(SuffixDrafter(), context([4, 1, 2, 3, 1, 2, 3], "chain(6)")).token_ids.tolist() == [1, 2, 3, 1, 2, 3]


def test_budget_bounds_nodes_and_depth():
    ctx = context([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], "dynamic(3,2,8)")
    assert [propose(SuffixDrafter(), ctx, budget).num_nodes for budget in (0, 1, 2, 8)] == [0, 1, 2, 3]


def test_earlier_answers_are_drafted_from_but_not_earlier_prompts():
    drafter = SuffixDrafter()
    answer(drafter, [30, 31, 32], [1, 2, 3, 4, 5])
    assert propose(drafter, context([9, 2, 3])).token_ids.tolist() == [4, 5]
    assert propose(drafter, context([9, 30, 31])).num_nodes == 0


def test_the_tree_of_the_higher_score_is_taken_and_the_request_s_own_where_they_tie():
    drafter = SuffixDrafter()
    answer(drafter, [0], [1, 2, 3, 4, 5, 6, 7, 8])
    own = [2, 9, 3, 9, 3]  # "3" stood before once: two nodes; "2 3" is longer in the shared tree
    assert propose(drafter, context([*own, 2, 3])).token_ids.tolist() == [4, 5, 6, 7]
    assert propose(drafter, context([2, 3, 60, 61, 62, 63, 2, 3])).token_ids.tolist() == [60, 61, 62, 63]


def test_a_request_is_no_earlier_answer_of_its_own_and_samples_help_one_another():
    drafter = SuffixDrafter()
    first = answer(drafter, [7], [1, 2, 3, 1, 2, 4, 1, 2])
    assert paths(propose(drafter, first)) == paths(propose(SuffixDrafter(), context(first.token_ids)))
    assert drafter.shared.num_tokens == 8
    second = answer(drafter, [7], [4])
    assert propose(drafter, second).token_ids.tolist() == [1, 2]


def test_a_handed_over_request_drafts_as_one_that_was_observed_from_the_start():
    drafter, random = SuffixDrafter(), np.random.default_rng(0)
    grown = context([1, 2, 3], "dynamic(4,4,8)")
    drafter.resume(grown, None, {})
    for _ in range(30):
        outputs = random.integers(0, 4, int(random.integers(1, 4))).tolist()
        grown.token_ids += outputs
        drafter.observe([(grown, Verdict(path=(), output_ids=tuple(outputs)), NO_ROWS)])
        fresh = context(grown.token_ids, "dynamic(4,4,8)")
        assert paths(propose(drafter, grown)) == paths(propose(SuffixDrafter(), fresh))


def test_the_same_history_gives_the_same_drafts():
    def drafts():
        drafter, random = SuffixDrafter(shared_tokens=60), np.random.default_rng(3)
        running = [context(random.integers(0, 5, 4).tolist()) for _ in range(3)]
        for _ in range(40):
            for ctx in running:
                ctx.token_ids += random.integers(0, 5, 2).tolist()
            yield [[array.tolist() for array in (d.token_ids, d.parents, d.survival)]
                   for d in drafter.propose(running, [8] * 3)]  # fmt: skip
            verdicts = [Verdict(path=(0,), output_ids=tuple(ctx.token_ids[-2:])) for ctx in running]
            drafter.observe([(ctx, verdict, NO_ROWS) for ctx, verdict in zip(running, verdicts, strict=True)])
            assert drafter.shared.num_tokens <= 60

    first = list(drafts())
    assert first == list(drafts()) and any(nodes for step in first for nodes, *_ in step)


def test_a_request_that_is_dropped_leaves_nothing_but_its_tokens():
    drafter = SuffixDrafter(shared_tokens=20)
    gone = [weakref.ref(answer(drafter, list(range(50)), [n, n + 1, n + 2]).state) for n in range(100)]
    gc.collect()
    assert not any(state() for state in gone)
    assert drafter.shared.num_tokens == 18 and drafter.shared.num_sequences == 6


@pytest.mark.parametrize("tree", ["static(2x2)", "chain(33)", "dynamic(4,4,33)"])
def test_other_trees_are_refused(tree):
    with pytest.raises(InvalidRequest, match=r"tree: drafter suffix cannot draft .*k and nodes in 1\.\.32"):
        SuffixDrafter().depth(tree)


def test_nothing_is_shipped():
    drafter, ctx = SuffixDrafter(), context([1, 2, 3])
    drafter.prefill(ctx, NO_ROWS)
    assert drafter.start(ctx) == (None, {}) and ctx.state is None
    assert (drafter.groups, drafter.capture, drafter.want_final, drafter.rows_at(9)) == ((), (), False, {})
    assert drafter.fingerprint() == SuffixDrafter(shared_tokens=5).fingerprint()
    assert (drafter.depth(""), drafter.depth("chain(5)"), drafter.depth("dynamic(9,2,4)")) == (8, 5, 4)
