"""Every refusal names its field and a remedy; what is allowed passes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pdspec.errors import InvalidRequest, PdspecError, UnknownName
from pdspec.types import GenerateRequest, SamplingParams, UserRequest
from pdspec.validation import check_request, check_user_request

NAN, INF = math.nan, math.inf
GOOD = GenerateRequest(request_id="r", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=8))


def check(request: GenerateRequest) -> None:
    check_request(request, vocab_size=100, max_context=32, drafters=("none", "eagle3"), models=("m",))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=29),
        SamplingParams(max_tokens=1, min_tokens=1, temperature=0.8, top_p=1e-6, min_p=0.0, top_k=1, logprobs=20),
        SamplingParams(
            max_tokens=1, seed=0, stop_ids=(0, 99), stop_strings=("x",), logit_bias=((0, -100.0), (1, 100.0))
        ),
        SamplingParams(
            max_tokens=1, allowed_ids=(1, 2), banned_ids=(2, 3), repetition_penalty=1.2, presence_penalty=-2.0
        ),
    ],
)
def test_what_is_allowed_passes(sampling: SamplingParams) -> None:
    check(replace(GOOD, sampling=sampling, model="m", drafter="eagle3", draft_prefill="decode"))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 30]),
        ("min_tokens", [-1, 9]),
        ("temperature", [-0.1, NAN, INF, -INF, 1e-9, 1000.0]),
        ("top_p", [0.0, -0.5, 1.1, NAN]),
        ("min_p", [-0.1, 1.0, NAN]),
        ("top_k", [-1]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF]),
        ("presence_penalty", [NAN, 2.1, -INF]),
        ("frequency_penalty", [NAN, -2.1, INF]),
        ("seed", [-1, 2**64]),
        ("logprobs", [-1, 21]),
        ("stop_ids", [(100,), (-1,), (0,) * 257]),
        ("allowed_ids", [(100,)]),
        ("banned_ids", [(100,), (-5,), tuple(range(100))]),
        ("logit_bias", [((100, 1.0),), ((1, NAN),), ((1, 101.0),), ((1, 1.0), (1, 2.0))]),
        ("stop_strings", [("",), ("x" * 257,), ("x",) * 17]),
    ],
)
def test_sampling_is_refused_by_field(field: str, values: list) -> None:
    for value in values:
        bad = replace(GOOD, sampling=replace(GOOD.sampling, **{field: value}))
        with pytest.raises(InvalidRequest) as caught:
            check(bad)
        assert caught.value.field == f"sampling.{field}", value
        assert caught.value.remedy, value


@pytest.mark.parametrize(
    ("changes", "field", "kind"),
    [
        ({"prompt_ids": ()}, "prompt_ids", InvalidRequest),
        ({"prompt_ids": (1, 100)}, "prompt_ids", InvalidRequest),
        ({"prompt_ids": (1, -1)}, "prompt_ids", InvalidRequest),
        ({"prompt_ids": (1,) * 40}, "prompt_ids", InvalidRequest),
        ({"model": "other"}, "model", UnknownName),
        ({"drafter": "medusa"}, "drafter", UnknownName),
        ({"draft_prefill": "router"}, "draft_prefill", InvalidRequest),
        ({"sample": -1}, "sample", InvalidRequest),
        ({"replayed": 3}, "replayed", InvalidRequest),
        ({"replayed": -1}, "replayed", InvalidRequest),
        ({"deadline_s": 0.0}, "deadline_s", InvalidRequest),
    ],
)
def test_requests_are_refused_by_field(changes: dict, field: str, kind: type[PdspecError]) -> None:
    with pytest.raises(kind) as caught:
        check(replace(GOOD, **changes))
    assert caught.value.field == field and caught.value.remedy


def test_min_tokens_counts_the_whole_answer_of_a_moved_stream() -> None:
    moved = replace(GOOD, replayed=2, sampling=SamplingParams(max_tokens=3, min_tokens=5))
    check(moved)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        check(replace(moved, replayed=1))


def test_context_remedy_says_how_much_fits() -> None:
    with pytest.raises(InvalidRequest, match="at most 29 tokens"):
        check(replace(GOOD, sampling=SamplingParams(max_tokens=30)))


def test_banning_all_that_is_allowed_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no token is left"):
        check(replace(GOOD, sampling=SamplingParams(max_tokens=1, allowed_ids=(1,), banned_ids=(1, 2))))


def test_the_tree_is_parsed_by_the_given_parser() -> None:
    def parse(text: str) -> None:
        raise UnknownName("no such tree", field="tree")

    limits = {"vocab_size": 100, "max_context": 32}
    check_request(replace(GOOD, tree="pine"), **limits)
    check_request(GOOD, **limits, parse_tree=parse)
    with pytest.raises(UnknownName):
        check_request(replace(GOOD, tree="pine"), **limits, parse_tree=parse)


@pytest.mark.parametrize(
    ("user", "field"),
    [
        (UserRequest(), "input"),
        (UserRequest(text="a", prompt_ids=(1,)), "input"),
        (UserRequest(text=""), "text"),
        (UserRequest(chat=()), "chat"),
        (UserRequest(prompt_ids=()), "prompt_ids"),
        (UserRequest(text="a", handoff="pigeon"), "handoff"),
        (UserRequest(text="a", request_id="r" * 300), "request_id"),
    ],
)
def test_user_requests_are_refused_by_field(user: UserRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_user_request(user)
    assert caught.value.field == field and caught.value.remedy
