"""A plain chunk goes on as it would through its type, and only a plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdspec.types import DraftTrace, FinishReason, GenerationStats, TokenChunk, TokenLogprob
from pdspec.wire.codec import chunk_to_pb, generate_chunk_to_pb
from pdspec.wire.passing import is_plain, passed_on

PLAIN = TokenChunk(request_id="r", start=3, token_ids=(5, 6, 70000))


def test_a_plain_chunk_is_passed_on_as_its_type_would_be():
    message = chunk_to_pb(PLAIN)
    assert is_plain(message)
    moved = replace(PLAIN, start=9)  # the router counts from the answer's beginning
    assert passed_on(message, start=9, text="ab") == generate_chunk_to_pb(moved, text="ab")


@pytest.mark.parametrize(
    "more",
    [
        {"finish_reason": FinishReason.STOP},
        {"logprobs": (TokenLogprob(token_id=5, logprob=-1.0),)},
        {"stop_match": "x"},
        {"stats": GenerationStats()},
        {"trace": DraftTrace(token_ids=(), parents=(), accepted=0)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_whatever_else_a_chunk_holds_is_not_plain(more):
    assert not is_plain(chunk_to_pb(replace(PLAIN, **more)))
