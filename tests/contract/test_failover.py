"""Streams that lose their worker, their router or their way to a prefill worker, and requests that kill."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from fake_decode import TEXT, FakeDecode, byte_id, cluster, decode_server
from test_router import ASK, EXPECTED, ask, generate, ids_of, run, until

from pdspec.client import RouterClient, collect
from pdspec.config import RouterConfig
from pdspec.errors import Cancelled, InvalidRequest, Overloaded, PeerLost, Quarantined
from pdspec.types import FinishReason, SamplingParams, UserRequest
from pdspec.wire.codec import user_request_to_pb
from router import service


class Mute(FakeDecode):
    """Holds its stream, and on demand leaves heartbeats unanswered or makes no step, as a stopped process does."""

    silent = False
    stepping = 0

    async def Status(self, request, context):
        if self.silent:
            await asyncio.sleep(10)
        status = await super().Status(request, context)
        status.stepping = self.stepping
        return status


@pytest.mark.parametrize("how", ["silent", "stuck"])
def test_a_worker_that_stops_under_a_stream_is_left_for_another_and_healed(how: str) -> None:
    async def scenario() -> None:
        bad, good = Mute(name="bad", hold_after=7), FakeDecode(name="good", running=5)
        async with cluster(bad, good, lost_after_s=0.3, stall_s=0.3) as box:
            answer = asyncio.ensure_future(generate(box))
            await until(lambda: bad.running == 1)
            await asyncio.sleep(0.15)
            bad.silent, bad.stepping = how == "silent", int(how == "stuck")
            text, chunks, _ = await answer
            assert text == EXPECTED and chunks[-1].stats and chunks[-1].stats.moves == 1
            assert box.router.fleet.views()[0].state.value == "lost"
            await until(lambda: bad.cancelled == 1)
            bad.silent, bad.stepping = False, 0
            await until(lambda: box.router.fleet.views()[0].state.value == "ready")

    run(scenario)


def test_a_pause_of_the_router_itself_loses_nobody() -> None:
    async def scenario() -> None:
        worker = FakeDecode(pause_s=0.05)
        async with cluster(worker, lost_after_s=0.3) as box:
            answer = asyncio.ensure_future(generate(box))
            await until(lambda: worker.running == 1)
            time.sleep(1.0)  # the whole loop stands still, the fake worker with it
            _, chunks, _ = await answer
            assert chunks[-1].stats and chunks[-1].stats.moves == 0 and len(worker.requests) == 1

    run(scenario)


def test_an_answer_waits_for_its_only_worker_to_come_back() -> None:
    async def scenario() -> None:
        worker = FakeDecode(die_after=7)
        async with cluster(worker, failover_wait_s=20.0) as box:
            answer = asyncio.ensure_future(generate(box))
            await until(lambda: worker.dying is not None)
            assert worker.dying
            await worker.dying
            worker.die_after = None
            port = int(worker.address.rpartition(":")[2])
            async with decode_server(worker, port):
                text, chunks, _ = await answer
                assert text == EXPECTED and chunks[-1].stats and chunks[-1].stats.moves == 1
                assert [request.replayed for request, _ in worker.requests] == [0, 7]

    run(scenario)


def test_an_answer_may_come_back_to_a_worker_that_failed_it_before() -> None:
    async def scenario() -> None:
        one, two = FakeDecode(name="one", lie="gap"), FakeDecode(name="two", lie="gap", running=5)
        async with cluster(one, two, failover_wait_s=20.0) as box:
            text, chunks, _ = await generate(box, ask(max_tokens=6))
            assert text == EXPECTED[:6] and ids_of(chunks) == [byte_id(byte) for byte in TEXT[:6]]
            assert len(one.requests) + len(two.requests) > 2

    run(scenario)


def test_a_request_that_kills_is_quarantined_by_its_id() -> None:
    async def scenario() -> None:
        workers = [FakeDecode(name=f"d{index}", die_after=0) for index in range(4)]
        async with cluster(*workers, quarantine_after=3) as box:
            for _ in range(2):
                with pytest.raises(Quarantined) as caught:
                    await generate(box, UserRequest(text="x", request_id="poison"))
                assert caught.value.remedy
            assert sum(len(worker.requests) for worker in workers) == 3

    run(scenario)


def test_replays_are_bounded() -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode(lie="gap"), max_replays=2, failover_wait_s=20.0) as box:
            with pytest.raises(PeerLost):
                await generate(box, ask(max_tokens=12))

    run(scenario)


def test_overload_after_tokens_went_out_is_waited_out() -> None:
    async def scenario() -> None:
        bad = FakeDecode(name="bad", die_after=7)
        full = FakeDecode(name="full", fail_with=Overloaded("no pages"), running=5)
        async with cluster(bad, full, failover_wait_s=20.0) as box:
            answer = asyncio.ensure_future(generate(box))
            await until(lambda: len(full.requests) == 1)
            full.fail_with = None
            assert (await answer)[0] == EXPECTED

    run(scenario)


# --- a client that comes back ----------------------------------------------------------------------------------------


def resumed(count: int, **sampling: object) -> UserRequest:
    params = SamplingParams(**{"max_tokens": 20, "seed": 5, **sampling})  # type: ignore[arg-type]
    return UserRequest(text="Hello", sampling=params, resume_ids=tuple(byte_id(byte) for byte in TEXT[:count]))


@pytest.mark.parametrize("count", [1, 7, 19, 20])
def test_a_resumed_answer_goes_on_where_it_broke(count: int) -> None:
    async def scenario() -> None:
        worker = FakeDecode()
        async with cluster(worker) as box:
            call = box.stub.Generate(user_request_to_pb(resumed(count)))
            messages = [message async for message in call]
            assert "".join(m.text for m in messages) == EXPECTED[count:]
            assert messages[0].start == count and messages[-1].finish_reason == FinishReason.LENGTH
            assert messages[-1].stats.output_tokens == 20 and messages[-1].stats.partial
            if count < 20:
                assert worker.requests[0][0].replayed == count and worker.requests[0][0].sampling.seed == 5

    run(scenario)


def test_a_stop_string_is_found_across_the_break_between_two_routers() -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode()) as box:
            call = box.stub.Generate(user_request_to_pb(resumed(6, stop_strings=("quick",))))
            messages = [message async for message in call]
            assert "".join(message.text for message in messages) == ""  # "The " came before the break
            assert messages[-1].stop_match == "quick"

    run(scenario)


@pytest.mark.parametrize(
    ("user", "field"),
    [(resumed(3, seed=None), "sampling.seed"), (resumed(20, max_tokens=19), "resume_ids"),
     (UserRequest(text="x", sampling=SamplingParams(seed=1), resume_ids=(300,)), "resume_ids")],
)  # fmt: skip
def test_a_resumption_that_cannot_be_is_refused(user: UserRequest, field: str) -> None:
    async def scenario() -> None:
        async with cluster(FakeDecode()) as box:
            with pytest.raises(InvalidRequest) as caught:
                await generate(box, user)
            assert caught.value.field == field

    run(scenario)


@pytest.fixture
def slow_worker() -> Iterator[FakeDecode]:
    """On a loop of its own, so that the synchronous client may block this thread."""
    worker, ready, over = FakeDecode(pause_s=0.05), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with decode_server(worker):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    ready.wait(10)
    yield worker
    loop.call_soon_threadsafe(over.set)
    thread.join(10)


def test_a_client_outlives_its_router(slow_worker: FakeDecode) -> None:
    config = RouterConfig(port=0, model="tiny", decode=(slow_worker.address,), heartbeat_s=0.1)
    router = service.launch(config)
    port = int(router.address.rpartition(":")[2])
    try:
        with RouterClient(router.address) as client:
            client.wait_ready()
            pieces = []
            for piece in client.stream(ASK):
                pieces.append(piece)
                if len(pieces) == 3:
                    router.stop()
                    router = service.launch(config.replace(port=port))
            answer = collect(iter(pieces))
            assert answer.text == EXPECTED and answer.token_ids == tuple(byte_id(byte) for byte in TEXT[:20])
            assert client.reconnects > 0 and len({request.request_id for request, _ in slow_worker.requests}) == 1
            seeds = {request.sampling.seed for request, _ in slow_worker.requests}
            assert len(seeds) == 1 and answer.seed in seeds and len(slow_worker.requests) == 2
            threading.Timer(0.1, client.cancel).start()
            with pytest.raises(Cancelled):
                list(client.stream(ask(max_tokens=200)))
    finally:
        router.stop()


def test_without_reconnecting_a_lost_router_is_an_error(slow_worker: FakeDecode) -> None:
    router = service.launch(RouterConfig(port=0, model="tiny", decode=(slow_worker.address,), heartbeat_s=0.1))
    with RouterClient(router.address, reconnect_s=0.0) as client:
        client.wait_ready()
        with pytest.raises(PeerLost):
            for _ in client.stream(ASK):
                router.stop()
