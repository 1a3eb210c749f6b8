"""The router over fake decode workers: streams, refusals, cancels, reroutes, replays."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import grpc
import pytest
from fake_decode import TEXT, Cluster, FakeDecode, byte_id, cluster
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdspec.config import RouterConfig
from pdspec.errors import ConfigError, InvalidRequest, Overloaded, PdspecError, PeerLost, UnknownName
from pdspec.types import FinishReason, SamplingParams, TokenChunk, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.codec import chunk_from_pb, user_request_to_pb
from pdspec.wire.status import ERROR_KEY, from_rpc_error
from router import relay, service

ASK = UserRequest(text="Hello", sampling=SamplingParams(max_tokens=20))
EXPECTED = TEXT[:20].decode()


def ask(**sampling: object) -> UserRequest:
    return UserRequest(text="Hello", sampling=SamplingParams(**{"max_tokens": 20, **sampling}))  # type: ignore[arg-type]


async def generate(box: Cluster, user: UserRequest = ASK) -> tuple[str, list[TokenChunk], list[pb.GenerateChunk]]:
    """(text, chunks, messages). Raises the typed error."""
    call = box.stub.Generate(user_request_to_pb(user))
    try:
        messages = [message async for message in call]
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    finally:
        call.cancel()
    chunks = [chunk_from_pb(message) for message in messages]
    starts = [sum(len(chunk.token_ids) for chunk in chunks[:index]) for index in range(len(chunks))]
    assert [chunk.start for chunk in chunks] == starts
    return "".join(message.text for message in messages), chunks, messages


def ids_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


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
            assert deadline and 0 < deadline <= 0.5
            await until(lambda: worker.running == 0)

    run(scenario)


@pytest.mark.parametrize("fault", [{"die_after": 0}, {"fail_with": PeerLost("prefill worker p0 was lost")}])
def test_lost_before_the_first_token_is_routed_anew(fault: dict) -> None:
    async def scenario() -> None:
        bad, good = FakeDecode(name="bad", **fault), FakeDecode(name="good")
        async with cluster(bad, good) as box:
            good.running = 5  # so that the bad one is chosen first
            await box.router.fleet.refresh()
            text, chunks, _ = await generate(box)
            assert text == EXPECTED and chunks[-1].stats and chunks[-1].stats.moves == 0
            assert len(bad.requests) == 1 and good.requests[0][0].replayed == 0
            assert bad.requests[0][0].sampling.seed == good.requests[0][0].sampling.seed

    run(scenario)


@pytest.mark.parametrize("fault", [{"die_after": 7}, {"lie": "gap"}, {"lie": "cut"}, {"lie": "garbage"}])
def test_lost_after_tokens_went_out_is_replayed_and_each_token_comes_once(fault: dict) -> None:
    async def scenario() -> None:
        bad, good = FakeDecode(name="bad", **fault), FakeDecode(name="good")
        async with cluster(bad, good) as box:
            good.running = 5
            await box.router.fleet.refresh()
            text, chunks, messages = await generate(box, ask(seed=9, min_tokens=10))
            assert text == EXPECTED and ids_of(chunks) == [byte_id(byte) for byte in TEXT[:20]]
            first, replay = bad.requests[0][0], good.requests[0][0]
            sent = replay.replayed
            assert 0 < sent < 20 and replay.prompt_ids == (*first.prompt_ids, *ids_of(chunks)[:sent])
            sampling = replay.sampling
            assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (9, 20 - sent, 10)
            stats = chunks[-1].stats
            assert stats and (stats.moves, stats.partial, stats.output_tokens) == (1, True, 20)
            assert stats.prompt_tokens == len(first.prompt_ids)
            assert [bool(message.seed) for message in messages] == [True] + [False] * (len(messages) - 1)

    run(scenario)


def test_stop_strings_are_found_across_a_move() -> None:
    async def scenario() -> None:
        bad, good = FakeDecode(name="bad", die_after=7), FakeDecode(name="good")
        async with cluster(bad, good) as box:
            good.running = 5
            await box.router.fleet.refresh()
            text, chunks, _ = await generate(box, ask(stop_strings=("quick",)))
            assert text == "The " and chunks[-1].stop_match == "quick"

    run(scenario)


def test_without_another_worker_the_answer_is_an_error_and_not_complete() -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode(die_after=7)) as box:
            call = box.stub.Generate(user_request_to_pb(ASK))
            seen = []
            with pytest.raises(grpc.RpcError) as caught:
                async for message in call:
                    seen.append(message)
            assert seen and all(not message.finish_reason for message in seen)
            error = from_rpc_error(caught.value)
            assert isinstance(error, PeerLost) and "lost after 7 tokens" in error.message

    run(scenario)


def test_a_refusal_of_the_worker_reaches_the_client_typed() -> None:
    async def scenario() -> None:
        error = InvalidRequest("no such shape", field="tree", remedy="use chain(4)")
        worker = FakeDecode(fail_with=error)
        async with cluster(worker, FakeDecode(name="other")) as box:
            box.router.fleet._workers[worker.address].view()
            with pytest.raises(InvalidRequest) as caught:
                for _ in range(2):
                    await generate(box)
            assert (caught.value.field, caught.value.remedy) == ("tree", "use chain(4)")
            assert len(worker.requests) == 1

    run(scenario)


def test_overload_of_every_worker_has_a_retry_hint() -> None:
    async def scenario() -> None:
        full = Overloaded("no pages", retry_after_ms=321)
        async with cluster(FakeDecode(fail_with=full), FakeDecode(name="other", fail_with=full)) as box:
            call = box.stub.Generate(user_request_to_pb(ASK))
            with pytest.raises(grpc.RpcError) as caught:
                await call.read()
            trailing = dict(caught.value.trailing_metadata())  # type: ignore[attr-defined]
            assert trailing["grpc-retry-pushback-ms"] == "321" and ERROR_KEY in trailing
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]

    run(scenario)


def test_an_unexpected_error_is_internal_without_its_text() -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode(fail_with=RuntimeError("secret"))) as box:  # type: ignore[arg-type]
            with pytest.raises(PdspecError) as caught:
                await generate(box)
            assert type(caught.value) is PdspecError and "secret" not in str(caught.value)

    run(scenario)


def test_list_workers_says_why_a_worker_gets_nothing() -> None:
    async def scenario() -> None:
        odd = FakeDecode(name="odd", fingerprint="other")
        prefill = FakeDecode(name="p", role="prefill", draining=True)
        async with cluster(FakeDecode(), odd, prefill, prefill=("127.0.0.1:1",)) as box:
            listing = await box.stub.ListWorkers(pb.ListWorkersRequest())
            states = {worker.worker_id or worker.address: worker for worker in listing.workers}
            assert [states[name].state for name in ("d0", "odd", "p", "127.0.0.1:1")] == [
                "ready", "refused", "draining", "lost",
            ]  # fmt: skip
            assert "fingerprint other differs from f" in states["odd"].reason
            assert "UNAVAILABLE" in states["127.0.0.1:1"].reason and states["127.0.0.1:1"].role == "prefill"
            for _ in range(3):
                await generate(box)
            assert not odd.requests

    run(scenario)


def test_workers_come_and_go_at_run_time() -> None:
    async def scenario() -> None:
        first, second = FakeDecode(name="first"), FakeDecode(name="second")
        async with cluster(first, second) as box:
            fleet = box.router.fleet
            box.router.set_workers(prefill=(), decode=(second.address,))
            await until(lambda: [view.address for view in fleet.views()] == [second.address])
            await generate(box)
            box.router.set_workers(prefill=(), decode=())
            with pytest.raises(PeerLost, match="no decode worker is ready"):
                await generate(box)
            box.router.set_workers(prefill=(), decode=(first.address,))
            await until(lambda: any(view.state.value == "ready" for view in fleet.views()))
            await generate(box)
            assert (len(first.requests), len(second.requests)) == (1, 1)

    run(scenario)


def test_a_worker_taken_out_finishes_its_stream() -> None:
    async def scenario() -> None:
        worker = FakeDecode(pause_s=0.05)
        async with cluster(worker) as box:
            answer = asyncio.ensure_future(generate(box))
            await until(lambda: worker.running == 1)
            box.router.set_workers(prefill=(), decode=())
            assert (await answer)[0] == EXPECTED
            await until(lambda: not box.router.fleet.views())

    run(scenario)


def test_a_dead_worker_is_noticed_and_a_living_one_found_again() -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with cluster(worker) as box:
            box.router.fleet.lose(worker.address, "test")
            assert box.router.fleet.views()[0].state.value == "lost"
            await until(lambda: box.router.fleet.views()[0].state.value == "ready")
            assert worker.server
            await worker.server.stop(0)
            await until(lambda: box.router.fleet.views()[0].state.value == "lost")

    run(scenario)


def test_concurrent_requests_spread_over_workers_before_any_report() -> None:
    async def scenario() -> None:
        workers = [FakeDecode(name=f"d{index}", pause_s=0.02) for index in range(3)]
        async with cluster(*workers, heartbeat_s=30.0) as box:
            answers = await asyncio.gather(*(generate(box) for _ in range(9)))
            assert all(text == EXPECTED for text, _, _ in answers)
            assert [len(worker.requests) for worker in workers] == [3, 3, 3]

    run(scenario)


def test_health_follows_the_fleet() -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with cluster(worker) as box:
            stub = health_pb2_grpc.HealthStub(box.channel)

            async def status() -> int:
                return (await stub.Check(health_pb2.HealthCheckRequest(service="pdspec.v1.Router"))).status

            assert await status() == health_pb2.HealthCheckResponse.SERVING
            assert worker.server
            await worker.server.stop(0)
            await until(lambda: box.router.fleet.views()[0].state.value == "lost")
            await asyncio.sleep(0.05)
            assert await status() == health_pb2.HealthCheckResponse.NOT_SERVING

    run(scenario)


@pytest.mark.parametrize("launch", [service.launch, relay.launch])
def test_launch_on_a_thread_and_a_taken_port(launch: Callable) -> None:
    config = RouterConfig(port=0, model="tiny")
    running = launch(config)
    try:
        assert running.alive()
        port = int(running.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"{port}.*taken") as caught:
            launch(config.replace(port=port))
        assert (caught.value.field, bool(caught.value.remedy)) == ("port", True)
    finally:
        running.stop()
        running.stop()
    assert not running.alive()
