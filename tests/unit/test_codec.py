"""The codec: what goes in comes out, unset is not zero, and broken ids are refused by field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdspec.errors import InvalidRequest
from pdspec.types import (
    FinishReason,
    GenerateRequest,
    GenerationStats,
    Handoff,
    Route,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    UserRequest,
    WorkerInfo,
)
from pdspec.wire import codec, stale_check
from pdspec.wire import pdspec_pb2 as pb

FULL = SamplingParams(
    temperature=0.8,
    top_k=5,
    top_p=0.95,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=-0.3,
    logit_bias=((3, 1.5), (4, -0.1)),
    allowed_ids=(1, 2, 3),
    banned_ids=(9,),
    seed=2**64 - 1,
    max_tokens=7,
    min_tokens=2,
    stop_ids=(0, 2),
    stop_strings=("\n\n", "é"),
    ignore_eos=True,
    logprobs=0,
    verify="rejection",
    json_schema='{"type": "object"}',
    regex="[a-z]+",
    choice=("yes", "nö"),
)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_ids_round_trip_as_little_endian_int32(ids: list[int]) -> None:
    data = codec.ids_to_bytes(ids)
    assert data == b"".join(value.to_bytes(4, "little", signed=True) for value in ids)
    assert codec.bytes_to_ids(data, "x") == tuple(ids)


def test_broken_id_bytes_name_the_field() -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.stop_ids") as caught:
        codec.sampling_from_pb(pb.SamplingParams(stop_ids=b"12345"))
    assert caught.value.field == "sampling.stop_ids" and "int32" in caught.value.remedy


def test_ids_beyond_int32_are_refused_by_field() -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.user_request_to_pb(UserRequest(prompt_ids=(2**31,)))
    assert caught.value.field == "prompt_ids"


@pytest.mark.parametrize(
    "change", [{"max_tokens": 2**40}, {"seed": -1}, {"temperature": "hot"}, {"stop_strings": (3,)}]
)
def test_values_that_do_not_fit_the_message_are_refused(change: dict) -> None:
    with pytest.raises(InvalidRequest):
        codec.sampling_to_pb(SamplingParams(**change))


@pytest.mark.parametrize("params", [SamplingParams(), FULL])
def test_sampling_round_trip_is_exact(params: SamplingParams) -> None:
    assert codec.sampling_from_pb(codec.sampling_to_pb(params)) == params


def test_unset_fields_take_defaults_and_zeros_stay_zeros() -> None:
    assert codec.sampling_from_pb(pb.SamplingParams()) == SamplingParams()
    explicit = codec.sampling_from_pb(pb.SamplingParams(top_p=0.0, max_tokens=0, repetition_penalty=0.0, seed=0))
    assert (explicit.top_p, explicit.max_tokens, explicit.repetition_penalty, explicit.seed) == (0.0, 0, 0.0, 0)


@pytest.mark.parametrize(
    "content", [{"text": ""}, {"chat": (("user", "hé"),)}, {"chat": ()}, {"prompt_ids": ()}, {"prompt_ids": (1,)}]
)
def test_user_request_keeps_which_input_was_given(content: dict) -> None:
    request = UserRequest(
        **content,
        request_id="r",
        sampling=FULL,
        model="m",
        drafter="d",
        tree="chain(2)",
        draft_prefill="decode",
        handoff="relay",
        sample=3,
    )
    assert codec.user_request_from_pb(codec.user_request_to_pb(request)) == request


def test_worker_request_round_trip() -> None:
    request = GenerateRequest(
        request_id="r",
        prompt_ids=(5, 6, 7),
        sampling=FULL,
        model="m",
        drafter="d",
        tree="t",
        draft_prefill="prefill",
        sample=2,
        deadline_s=1.5,
        replayed=2,
    )
    assert codec.worker_request_from_bytes(codec.worker_request_to_bytes(request)) == request
    route = Route(decode="h:1", prefill=("h:2", "h:3"), handoff=Handoff.RELAY, relay="h:4")
    assert codec.decode_request_from_pb(codec.decode_request_to_pb(request, route)) == (request, route)
    with pytest.raises(InvalidRequest):
        codec.worker_request_from_bytes(b"\xff\xff")
    with pytest.raises(InvalidRequest, match="handoff"):
        codec.route_from_pb(pb.Route(handoff="pigeon"))


def test_chunk_round_trip() -> None:
    stats = GenerationStats(
        prompt_tokens=3, output_tokens=4, accepted_per_position=(2, 1), kv_bytes=2**40, decode_ms=1.25, partial=True
    )
    logprob = TokenLogprob(token_id=4, logprob=-0.5, top=((4, -0.5), (5, -1.0)))
    chunk = TokenChunk(
        request_id="r",
        start=2,
        token_ids=(4, 5),
        logprobs=(logprob,),
        finish_reason=FinishReason.STOP,
        stop_match="x",
        stats=stats,
    )
    assert codec.chunk_from_pb(codec.chunk_to_pb(chunk)) == chunk
    sent = codec.generate_chunk_to_pb(chunk, text="hi", seed=7)
    assert codec.chunk_from_pb(sent) == chunk and (sent.text, sent.seed) == ("hi", 7)
    bare = TokenChunk(request_id="r", start=0, token_ids=(1,))
    assert codec.chunk_from_pb(codec.chunk_to_pb(bare)) == bare
    with pytest.raises(InvalidRequest, match="finish_reason"):
        codec.chunk_from_pb(pb.DecodeChunk(finish_reason="bored"))


def test_worker_info_round_trip() -> None:
    info = WorkerInfo(
        worker_id="w",
        role="decode",
        address="h:1",
        model="m",
        fingerprint="ab",
        drafters=("none", "eagle3"),
        queued=1,
        running=2,
        free_pages=3,
        total_pages=4,
        page_size=8,
        max_context=9,
        vocab_size=10,
        steps=11,
        draining=True,
        metrics={"x": 1.5},
    )
    assert codec.worker_info_from_pb(codec.worker_info_to_pb(info)) == info


def test_every_stats_field_exists_on_both_sides() -> None:
    assert {field.name for field in pb.Stats.DESCRIPTOR.fields} == set(GenerationStats.__dataclass_fields__)


def test_committed_stubs_are_fresh() -> None:
    assert stale_check.stale_stubs() == []
