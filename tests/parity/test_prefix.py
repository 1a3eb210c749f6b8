"""Prefix caches on both sides of the handoff: the same tokens, proposals and accepted counts as without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from pdspec.config import RouterConfig
from pdspec.types import GenerateRequest, Handoff
from router import relay
from tests.parity.roles import EVERY, WITH_MEMORY, Answer, Roles, request, running

CASES = [
    ("none", ""),
    ("ngram", "chain(4)"),
    ("lookahead", "chain(3)"),
    ("medusa", "static(3x2x1)"),
    ("eagle1", "chain(3)"),
    ("eagle2", "dynamic(4,4,8)"),
    ("eagle3", "dynamic(4,4,8)"),
    ("mtp", "static(2x2x1)"),
    ("draft_model", "chain(4)"),
    ("sparse", "static(2x2)"),
    ("combined", "dynamic(4,4,8)"),
]
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    sizes = {"prefill": {"page_size": 16, "chunk": 8}, "decode": {"page_size": 8}}
    with running(dtype="float32", **sizes, **EVERY) as roles:
        yield roles


@pytest.fixture(scope="module")
def passing():
    started = relay.launch(RouterConfig(port=0))
    yield started
    started.stop()


def next_turn(asked: GenerateRequest, answer: Answer, *more: int) -> GenerateRequest:
    """The conversation so far, and what the user says next."""
    return dataclasses.replace(asked, prompt_ids=(*asked.prompt_ids, *answer.tokens, *more))


def check(roles: Roles, asked: GenerateRequest, answer: Answer) -> None:
    local = roles.ask_local(asked)
    assert answer.tokens == local.tokens
    assert answer.logprobs == local.logprobs
    assert answer.traces == local.traces or asked.drafter in WITH_MEMORY
    assert answer.stats.draft_rebuilds == 0


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("handoff", list(Handoff))
@pytest.mark.parametrize(("drafter", "tree"), CASES)
def test_a_conversation_is_the_same_and_moves_only_what_is_new(roles, passing, drafter, tree, handoff, mode):
    route = roles.route(handoff=handoff, relay=passing.address if handoff is Handoff.RELAY else "")
    index = CASES.index((drafter, tree)) + (20 if mode == "decode" else 0) + (40 if handoff is Handoff.RELAY else 0)
    asked = request(drafter, tree, n=30 + index % 9, seed=100 + index, sampling=SAMPLED, draft_prefill=mode)
    for turn in range(3):
        (answer,) = roles.ask(asked, route=route)
        check(roles, asked, answer)
        if turn:
            n = len(asked.prompt_ids)
            assert answer.stats.cached_tokens >= n - 7 - 2 * 8 - 5
            assert answer.stats.prefill_cached_tokens > 0
        asked = next_turn(asked, answer, *range(7))
