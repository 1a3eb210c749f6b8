"""An answer that moves to another decode worker after tokens went out: same tokens, same log probabilities, and a draft
state that is what it would have been without the move, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from pdspec.spec.registry import NAMES, family
from tests.contract.around import check_clean
from tests.parity.roles import EVERY, WITH_MEMORY, Answer, Roles, request, running

TREES = {"chain": "chain(3)", "static": "static(2x2)", "dynamic": "dynamic(3,2,5)"}
_KINDS = [(name, TREES[kind]) for name in NAMES for kind in family(name).DESCRIPTION.trees] + [("none", "")]
KEEPS_A_POOL = ("lookahead", *WITH_MEMORY)  # what they drafted before the move is part of what they draft after it
WAYS = {
    "greedy": {"logprobs": 0, "max_tokens": 24},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "logprobs": 2, "repetition_penalty": 1.2, "presence_penalty": 0.3,
                "min_tokens": 20, "max_tokens": 24, "ignore_eos": False},
}  # fmt: skip
CASES = [(*case, ("sampled", "greedy")[index % 2]) for index, case in enumerate(_KINDS)]


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    with running(**EVERY, dtype="float32") as roles:
        yield roles
        check_clean(roles)


def rest_of(asked, answer: Answer, sent: int):
    """What the router asks another worker for, once ``sent`` tokens are out."""
    sampling = dataclasses.replace(asked.sampling, max_tokens=asked.sampling.max_tokens - sent)
    ids = (*asked.prompt_ids, *answer.tokens[:sent])
    return dataclasses.replace(asked, prompt_ids=ids, replayed=sent, sampling=sampling)


def ends(answer: Answer) -> list[int]:
    """Tokens that were out after each verification."""
    found, at = [], 1
    for trace in answer.traces:
        at += trace.accepted + 1
        found.append(at)
    return found


@pytest.mark.parametrize(("drafter", "tree", "way"), CASES)
def test_a_replay_goes_on_with_the_same_tokens_and_drafts(roles: Roles, drafter: str, tree: str, way: str) -> None:
    asked = request(drafter, tree, n=30, seed=7, sampling=WAYS[way])
    (whole,) = roles.ask(asked)
    verified = len(whole.traces) // 2
    # One token before the end of a verification: the replay's first token is that one, and its next root the same.
    sent = ends(whole)[verified] - 1
    for side in ("prefill", "decode"):
        moved = dataclasses.replace(rest_of(asked, whole, sent), draft_prefill=side)
        (answer,) = roles.ask(moved)
        assert answer.tokens == whole.tokens[sent:]
        assert answer.logprobs == whole.logprobs[sent:]
        if drafter not in KEEPS_A_POOL:
            assert answer.traces == whole.traces[verified + 1 :]


def test_answers_move_at_every_token(roles: Roles) -> None:
    asked = request("eagle3", "dynamic(3,2,5)", n=30, seed=8, sampling=WAYS["sampled"])
    (whole,) = roles.ask(asked)
    rests = [rest_of(asked, whole, sent) for sent in range(1, len(whole.tokens))]
    for sent, answer in enumerate(roles.ask(*rests), start=1):
        assert (answer.tokens, answer.logprobs) == (whole.tokens[sent:], whole.logprobs[sent:])
