import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec.errors import InvalidRequest
from pdspec.spec.ngram.drafter import NgramDrafter
from pdspec.spec.none.drafter import NoDrafter
from pdspec.spec.protocol import DraftContext, HiddenRows, Verdict
from pdspec.types import SamplingParams

NO_ROWS = HiddenRows(start=0, captured=None, final=None)


def context(tokens, tree="") -> DraftContext:
    return DraftContext(
        request_id="r", sampling=SamplingParams(), noise_key=(0, 0), token_ids=list(tokens), pages=[],
        prompt_len=len(tokens), tree=tree,
    )


def proposal(tokens, budget=7, tree="", drafter=None) -> list[int]:
    (draft,) = (drafter or NgramDrafter()).propose([context(tokens, tree)], [budget])
    assert draft.parents.tolist() == list(range(-1, draft.num_nodes - 1))
    return draft.token_ids.tolist()


def searched(tokens, length, longest=4) -> list[int]:
    """The definition: scan backwards for the latest earlier occurrence of the longest suffix."""
    for n in range(min(longest, len(tokens)), 0, -1):
        suffix = tokens[len(tokens) - n :]
        for end in range(len(tokens) - 2, n - 2, -1):
            if tokens[end - n + 1 : end + 1] == suffix:
                grown = list(tokens)
                while len(grown) < len(tokens) + length:
                    grown.append(grown[end + 1 + len(grown) - len(tokens)])
                return grown[len(tokens) :]
    return []


@pytest.mark.parametrize(("tokens", "expected"), [
    ([1, 2, 3, 4, 9, 8, 1, 2, 3], [4, 9, 8, 1, 2, 3, 4]),
    ([5, 1, 2, 7, 2, 8, 1, 2], [7, 2, 8, 1, 2, 7, 2]),  # two tokens match before one, though one matched later
    ([3, 1, 3, 2, 3], [2, 3, 2, 3, 2, 3, 2]),  # the latest occurrence
    ([4, 4], [4] * 7),
    ([1, 2, 3], []),
    ([1], []),
])
def test_proposes_what_followed_last_time(tokens, expected):
    assert proposal(tokens) == expected


def test_budget_and_tree_bound_the_chain():
    assert proposal([1, 2, 1], budget=2) == [2, 1]
    assert proposal([1, 2, 1], tree="chain(3)") == [2, 1, 2]
    assert proposal([1, 2, 1], budget=0) == []


@pytest.mark.parametrize("tree", ["dynamic(4,4,8)", "static(2x2)", "chain(33)"])
def test_other_trees_are_refused(tree):
    with pytest.raises(InvalidRequest, match=r"tree: drafter ngram cannot draft .*chain\(k\) with k in 1..32"):
        proposal([1, 2, 1], tree=tree)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(1, 5), max_size=20), st.booleans())
def test_incremental_index_equals_searching_from_scratch(tokens, strides, resumed):
    drafter, ctx, grown = NgramDrafter(), context(tokens[:1]), 1
    if resumed:
        drafter.resume(ctx, *drafter.start(ctx))
    while True:
        (draft,) = drafter.propose([ctx], [7])
        assert draft.token_ids.tolist() == searched(ctx.token_ids, 7)
        if grown >= len(tokens):
            break
        stride = strides.pop() if strides else 1
        ctx.token_ids.extend(tokens[grown : grown + stride])
        grown += stride


def test_survival_falls_along_the_chain_and_follows_evidence():
    drafter, ctx = NgramDrafter(), context([1, 2, 1])
    (first,) = drafter.propose([ctx], [4])
    assert np.isnan(first.log_q).all()
    assert (np.diff(first.survival) < 0).all() and 0 < first.survival[0] < 1
    for _ in range(20):
        drafter.observe([(ctx, Verdict(path=(), output_ids=(9,)), NO_ROWS)])
        (draft,) = drafter.propose([ctx], [4])
    assert draft.survival[0] < first.survival[0] / 3
    for _ in range(60):
        drafter.observe([(ctx, Verdict(path=(0,), output_ids=(2, 9)), NO_ROWS)])
        (draft,) = drafter.propose([ctx], [4])
    assert draft.survival[0] > 0.6


def test_sequences_do_not_share_an_index():
    drafter = NgramDrafter()
    first, second = drafter.propose([context([1, 2, 1]), context([7, 1])], [3, 3])
    assert first.num_nodes == 3 and second.num_nodes == 0


@pytest.mark.parametrize("drafter", [NgramDrafter(), NoDrafter()])
def test_model_free_drafters_ship_nothing(drafter):
    ctx = context([1, 2, 3])
    drafter.prefill(ctx, NO_ROWS)
    assert drafter.start(ctx) == (None, {})
    assert (drafter.groups, drafter.capture, drafter.want_final, drafter.rows_at(9)) == ((), (), False, {})
    assert drafter.fingerprint() == type(drafter)().fingerprint()


def test_none_proposes_nothing():
    drafter, ctx = NoDrafter(), context([1, 1, 1, 1])
    drafter.resume(ctx, None, {})
    (draft,) = drafter.propose([ctx], [8])
    drafter.observe([(ctx, Verdict(path=(), output_ids=(1,)), NO_ROWS)])
    assert draft.num_nodes == 0 and ctx.state is None
