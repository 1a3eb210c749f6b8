"""The router over fake decode workers: streams, refusals, stop strings, cancels and deadlines."""

from __future__ import annotations

import math

import grpc
import pytest
from asking import ASK, EXPECTED, ask, generate, ids_of, run, until
from fake_decode import TEXT, FakeDecode, byte_id, cluster

from pdspec.errors import InvalidRequest, UnknownName
from pdspec.types import FinishReason, SamplingParams, UserRequest
from pdspec.wire.codec import user_request_to_pb
from pdspec.wire.status import from_rpc_error


def test_streams_text_and_ids_one_message_per_verification() -> None:
    async def scenario() -> None:
        worker = FakeDecode(chunk=4)
        async with cluster(worker) as box:
            text, chunks, messages = await generate(box)
            assert text == EXPECTED and ids_of(chunks) == [byte_id(byte) for byte in TEXT[:20]]
            assert [len(chunk.token_ids) for chunk in chunks] == [1, 4, 4, 4, 4, 3]
            assert [chunk.finish_reason for chunk in chunks] == [None] * 5 + [FinishReason.LENGTH]
            stats = chunks[-1].stats
            assert stats and (stats.output_tokens, stats.verifications, stats.kv_bytes) == (20, 5, 7)
            assert not stats.partial and all(chunk.stats is None for chunk in chunks[:-1])
            request, route = worker.requests[0]
            assert messages[0].seed == request.sampling.seed != 0 and all(not m.seed for m in messages[1:])
            assert request.request_id == messages[0].request_id and route.decode == worker.address
            assert (worker.cancelled, worker.running) == (0, 0)  # it ended by itself

    run(scenario)


def test_a_given_seed_and_id_are_kept_and_drawn_ones_differ() -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with cluster(worker) as box:
            _, _, messages = await generate(
                box, UserRequest(text="x", request_id="mine", sampling=SamplingParams(seed=5))
            )
            assert (messages[0].seed, messages[0].request_id) == (5, "mine")
            await generate(box)
            await generate(box)
            seeds = [request.sampling.seed for request, _ in worker.requests]
            assert len(set(seeds)) == 3

    run(scenario)


@pytest.mark.parametrize("user", [UserRequest(chat=(("user", "Hi"),)), UserRequest(prompt_ids=(5, 6, 7))])
def test_chat_and_ids(user: UserRequest) -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with cluster(worker) as box:
            await generate(box, user)
            ids = worker.requests[0][0].prompt_ids
            assert ids == user.prompt_ids if user.prompt_ids else len(ids) > 2

    run(scenario)


BAD = [
    (UserRequest(), "input", InvalidRequest),
    (UserRequest(text=""), "text", InvalidRequest),
    (UserRequest(chat=()), "chat", InvalidRequest),
    (UserRequest(prompt_ids=()), "prompt_ids", InvalidRequest),
    (UserRequest(prompt_ids=(300,)), "prompt_ids", InvalidRequest),
    (UserRequest(prompt_ids=(-1,)), "prompt_ids", InvalidRequest),
    (UserRequest(prompt_ids=(1,) * 600), "prompt_ids", InvalidRequest),
    (UserRequest(text="x", model="gpt"), "model", UnknownName),
    (UserRequest(text="x", drafter="medusa"), "drafter", UnknownName),
    (UserRequest(text="x", draft_prefill="nowhere"), "draft_prefill", InvalidRequest),
    (UserRequest(text="x", handoff="pigeon"), "handoff", InvalidRequest),
    (UserRequest(text="x", handoff="relay"), "handoff", InvalidRequest),
    (ask(max_tokens=0), "sampling.max_tokens", InvalidRequest),
    (ask(max_tokens=-5), "sampling.max_tokens", InvalidRequest),
    (ask(max_tokens=512), "sampling.max_tokens", InvalidRequest),
    (ask(temperature=-1.0), "sampling.temperature", InvalidRequest),
    (ask(temperature=math.nan), "sampling.temperature", InvalidRequest),
    (ask(top_p=0.0), "sampling.top_p", InvalidRequest),
    (ask(top_p=1.5), "sampling.top_p", InvalidRequest),
    (ask(stop_ids=(300,)), "sampling.stop_ids", InvalidRequest),
]


def test_bad_input_is_a_status_that_names_field_and_remedy() -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with cluster(worker) as box:
            for user, field, kind in BAD:
                with pytest.raises(kind) as caught:
                    await generate(box, user)
                assert (caught.value.field, bool(caught.value.remedy)) == (field, True), user
            assert not worker.requests
            assert (await generate(box))[0] == EXPECTED

    run(scenario)


def test_other_clients_see_code_and_text() -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode()) as box:
            call = box.stub.Generate(user_request_to_pb(ask(top_p=2.0)))
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
            error = caught.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
            assert "sampling.top_p" in error.details() and "give above 0" in error.details()  # type: ignore[attr-defined]

    run(scenario)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff\xff\xff", "not a valid protobuf"),
        (b"\x0a\xff", "not a valid protobuf"),
        (b"\x00" * 5000, "above the limit of 4096"),
    ],
)
def test_malformed_and_oversized_messages(data: bytes, text: str) -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode(), max_message_bytes=4096) as box:
            call = box.channel.unary_stream("/pdspec.v1.Router/Generate")(data)
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidRequest) and text in error.message
            assert error.field == "GenerateRequest" and error.remedy
            assert (await generate(box))[0] == EXPECTED

    run(scenario)


def test_a_message_beyond_the_transport_is_refused_with_a_remedy() -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode(), max_message_bytes=4096) as box:
            call = box.channel.unary_stream("/pdspec.v1.Router/Generate")(b"\x00" * (2 << 20))
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
            error = from_rpc_error(caught.value)
            assert isinstance(error, InvalidRequest) and "max_message_bytes" in error.remedy
            assert (await generate(box))[0] == EXPECTED

    run(scenario)


def test_stop_strings_cut_text_and_ids_and_cancel_the_worker() -> None:
    async def scenario() -> None:
        worker = FakeDecode(chunk=4, hold_after=13)
        async with cluster(worker) as box:
            text, chunks, _ = await generate(box, ask(stop_strings=("zzz", "ck br")))
            assert text == "The qui"
            assert ids_of(chunks) == [byte_id(byte) for byte in b"The quick br"]
            last = chunks[-1]
            assert (last.finish_reason, last.stop_match) == (FinishReason.STOP, "ck br")
            assert last.stats and last.stats.partial
            assert (last.stats.output_tokens, last.stats.verifications) == (12, 3)
            await until(lambda: worker.cancelled == 1 and worker.running == 0)

    run(scenario)


def test_text_held_for_a_stop_string_comes_at_the_end() -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode()) as box:
            text, chunks, _ = await generate(box, ask(max_tokens=9, stop_strings=("quick!",)))
            assert text == "The quick" and chunks[-1].finish_reason is FinishReason.LENGTH
            assert chunks[-1].stats and not chunks[-1].stats.partial

    run(scenario)


def test_cancelling_the_client_cancels_the_decode_call() -> None:
    async def scenario() -> None:
        worker = FakeDecode(hold_after=4)
        async with cluster(worker) as box:
            call = box.stub.Generate(user_request_to_pb(ASK))
            await call.read()
            assert worker.running == 1
            call.cancel()
            await until(lambda: worker.running == 0)
            assert worker.cancelled == 1
            assert all(view.load <= 1 for view in box.router.fleet.views())

    run(scenario)


def test_a_deadline_reaches_the_worker_and_ends_the_answer() -> None:
    async def scenario() -> None:
        worker = FakeDecode(hold_after=4)
        async with cluster(worker) as box:
            call = box.stub.Generate(user_request_to_pb(ASK), timeout=0.5)
            with pytest.raises(grpc.RpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
            deadline = worker.requests[0][0].deadline_s
            assert deadline and 0 < deadline < 0.51  # gRPC rounds what it sends up
            await until(lambda: worker.running == 0)

    run(scenario)
