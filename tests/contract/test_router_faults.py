"""The router over fake decode workers that fail, refuse, come and go: reroutes, replays, the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest
from asking import ASK, EXPECTED, ask, generate, ids_of, run, until
from fake_decode import TEXT, FakeDecode, byte_id, cluster
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdspec.config import RouterConfig
from pdspec.errors import ConfigError, InvalidRequest, Overloaded, PdspecError, PeerLost
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.codec import user_request_to_pb
from pdspec.wire.status import ERROR_KEY, from_rpc_error
from router import relay, service


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
