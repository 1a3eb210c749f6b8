"""Positive controls behind the handoff: a draft model that *is* the target and a sparse view that has every row foresee
each token; another model and a narrow view do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from pdspec.types import Handoff
from tests.parity.roles import EVERY, Answer, Roles, request, running
from tests.tiny_folder import save_tiny

TOKENS = 41  # the first, and eight verifications of a chain of 4 that is accepted whole
PURE: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 1.0}}
ALL_ROWS = {"sparse:sink": "0", "sparse:window": "4096"}
SNAPKV = {"sparse:select": "snapkv", "sparse:budget": "4096", "sparse:window": "64"}  # all of the prompt and the answer


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def roles(request) -> Iterator[Roles]:
    changes = {"prefill": {"page_size": 8, "chunk": 9}, "decode": {"page_size": 16}}
    with running(dtype=request.param, **changes, **{**EVERY, "options": ALL_ROWS}) as roles:
        yield roles


def chain(drafter: str, sampling: str, seed: int = 3, **changes: Any):
    params = {"max_tokens": TOKENS, **PURE[sampling]}
    return request(drafter, "chain(4)", n=30 + seed, seed=seed, sampling=params, **changes)


def assert_all_accepted(answer: Answer) -> None:
    assert len(answer.tokens) == TOKENS and answer.stats is not None
    assert [len(trace.token_ids) for trace in answer.traces] == [4] * 8
    assert [trace.accepted for trace in answer.traces] == [4] * 8
    assert answer.stats.draft_rebuilds == 0


@pytest.mark.parametrize("mode", ["prefill", "decode", "alone"])
@pytest.mark.parametrize("sampling", PURE)
@pytest.mark.parametrize("drafter", ["draft_model", "sparse"])
def test_who_knows_the_target_is_accepted_whole(roles, drafter, sampling, mode):
    route = roles.route() if mode != "alone" else dataclasses.replace(roles.route(), prefill=())
    asked = [chain(drafter, sampling, seed, draft_prefill="" if mode == "alone" else mode) for seed in range(4)]
    for one, answer in zip(asked, roles.ask(*asked, route=route), strict=True):
        assert_all_accepted(answer)
        assert answer.tokens == roles.ask_local(dataclasses.replace(one, drafter="none", tree="")).tokens


@pytest.mark.parametrize("drafter", ["draft_model", "sparse"])
def test_a_chain_drawn_from_the_target_itself_is_never_rejected(roles, drafter):
    """min(1, p/q) = 1. A draft model's first chain comes from q cut to what was shipped, and may be."""
    asked = request(drafter, "chain(4)", n=40, sampling={"max_tokens": 60, "temperature": 1.0, "verify": "rejection"})
    (answer,) = roles.ask(asked)
    later = answer.traces[1:-1]
    assert len(later) >= 9 and all(trace.accepted == 4 for trace in later)
    assert drafter == "draft_model" or answer.traces[0].accepted == 4


def test_chosen_rows_that_are_all_rows_are_as_good():
    with running(dtype="float32", prefill={"chunk": 9}, **{**EVERY, "options": SNAPKV}) as roles:
        for mode in ("prefill", "decode"):
            for sampling in PURE:
                (answer,) = roles.ask(chain("sparse", sampling, draft_prefill=mode))
                assert_all_accepted(answer)


def test_another_model_and_a_narrow_view_are_not_accepted():
    few = {"sparse:sink": "0", "sparse:window": "0"}
    heads = {**EVERY["heads"], "draft_model": "tiny-3"}
    with running(dtype="float32", **{**EVERY, "options": few, "heads": heads}) as roles:
        for drafter in ("draft_model", "sparse"):
            asked = chain(drafter, "sampled")
            (answer,) = roles.ask(asked)
            assert answer.stats.accepted_tokens < 0.3 * answer.stats.drafted_tokens
            assert answer.tokens == roles.ask_local(dataclasses.replace(asked, drafter="none", tree="")).tokens
            assert answer.traces == roles.ask_local(asked).traces


def test_draft_rows_of_another_position_are_noticed(roles):
    """The control of the control: draft KV that arrives shifted by one row is accepted less."""
    asked = chain("draft_model", "greedy")
    cache = roles.prefill.engine.host.resources.cache
    real = cache.row_views

    def shifted(group, layer, pages, start, stop, *heads):
        if group == "draft/model" and start > 0:
            start, stop = start - 1, stop - 1
        return real(group, layer, pages, start, stop, *heads)

    cache.row_views = shifted
    try:
        (answer,) = roles.ask(asked, route=roles.route(handoff=Handoff.DIRECT))
    finally:
        del cache.row_views
    assert answer.stats.accepted_tokens < answer.stats.drafted_tokens
    assert answer.tokens == roles.ask_local(dataclasses.replace(asked, drafter="none", tree="")).tokens


def test_a_draft_model_of_a_shorter_context_is_handed_over_as_far_as_it_reaches(tmp_path):
    """Draft rows end at position 63; the answer goes on with empty drafts."""
    heads = {**EVERY["heads"], "draft_model": save_tiny(tmp_path, context=64)}
    with running(dtype="float32", prefill={"page_size": 8}, **{**EVERY, "heads": heads}) as roles:
        row = roles.local.resources.cache.layout("draft/model").row_bytes * 4
        for n, mode in product((50, 63, 64, 100), ("prefill", "decode")):
            asked = request("draft_model", "chain(4)", n=n, draft_prefill=mode)
            (answer,) = roles.ask(asked)
            local = roles.ask_local(asked)
            assert (answer.tokens, answer.traces) == (local.tokens, local.traces) and len(answer.tokens) == 40
            assert answer.tokens == roles.ask_local(dataclasses.replace(asked, drafter="none", tree="")).tokens
            assert answer.stats.draft_kv_bytes == (min(n + 1, 64) * row if mode == "prefill" else 0)
            assert (answer.stats.drafted_tokens > 0) == (n < 64) and answer.stats.draft_rebuilds == 0
