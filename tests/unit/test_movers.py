"""The Prefill stream over real gRPC, payloads in frames and in shared memory: they arrive whole, credit bounds them,
and every way to stop is an error."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import numpy as np
import pytest
from prefill_streams import OPEN, begin, collect, pages, serving

from pdspec.errors import Incompatible, PdspecError, PeerLost, TransferDamaged
from pdspec.transfer import frames
from pdspec.transfer.grpc_serve import PrefillStream
from pdspec.transfer.grpc_stream import METHOD, PrefillCall
from pdspec.wire.channels import make_channel


@pytest.fixture(params=["grpc", "shm"])
def mover(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_whole_handoff(mover: str) -> None:
    async def serve(stream: PrefillStream) -> None:
        assert dataclasses.replace(stream.open, segment="") == OPEN
        await stream.send(begin())
        for start in range(3):
            await stream.send(pages(1, start))
        await stream.send(frames.First(epoch=0, token_id=4))
        ids, floats = np.array([4], np.int32), np.zeros(1, np.float32)
        await stream.send(frames.DraftStart(epoch=0, seq=0, token_ids=ids, log_q=floats, score=floats))
        await stream.finish({"prefill_ms": 1.0})

    async def run() -> None:
        async with serving(serve) as channel:
            got, call = await collect(channel, mover)
            assert [frame.kind for frame in got] == ["begin", "pages", "pages", "pages", "first", "draft_start", "done"]
            call.ledger.check(got[-1])
            call.ledger.check_covered("target", layers=1, heads=1, start=0, stop=3)
            assert [frame.payload for frame in got[1:4]] == [pages(1, start).payload for start in range(3)]
            assert call.ledger.moved("target") == 3000 and {frame.epoch for frame in got} == {7}

    asyncio.run(run())


@pytest.mark.parametrize("window", [1500, 500])
def test_credit_bounds_what_is_under_way(window: int, mover: str) -> None:
    most = 0

    async def serve(stream: PrefillStream) -> None:
        nonlocal most
        await stream.send(begin())
        for start in range(20):
            await stream.send(pages(1, start))
            most = max(most, stream._window.in_flight)
        await stream.finish()

    async def run() -> None:
        async with serving(serve, alive_s=0.05) as channel:
            got, call = await collect(channel, mover, dataclasses.replace(OPEN, credit=window))
            call.ledger.check(got[-1])
            assert most == 1000

    asyncio.run(run())


def test_a_receiver_that_consumes_nothing_stops_the_sender(mover: str) -> None:
    failure: list[Exception] = []

    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        try:
            for start in range(20):
                await stream.send(pages(1, start))
        except PeerLost as error:
            failure.append(error)
            raise

    async def run() -> None:
        async with serving(serve, stall_timeout_s=0.2) as channel:
            with pytest.raises(PeerLost, match="no credit"):
                await collect(channel, mover, dataclasses.replace(OPEN, credit=1500), auto_grant=False)
        assert failure

    asyncio.run(run())


@pytest.mark.parametrize(("moving", "outcome"), [(True, "done"), (False, "lost")])
def test_busy_is_told_from_stuck(moving: bool, outcome: str, mover: str) -> None:
    count = 0

    def steps() -> int:
        nonlocal count
        count += moving
        return count

    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        await asyncio.sleep(0.8)
        await stream.finish()

    async def run() -> str:
        async with serving(serve, steps=steps, alive_s=0.05) as channel:
            try:
                got, _ = await collect(channel, mover, stall_timeout_s=0.3)
            except PeerLost as error:
                assert "no progress" in str(error)
                return "lost"
            return got[-1].kind

    assert asyncio.run(run()) == outcome


def test_a_typed_error_arrives_typed(mover: str) -> None:
    async def serve(stream: PrefillStream) -> None:
        raise Incompatible("page layout differs", field="fingerprint.kv", remedy="use the same dtype")

    async def run() -> PdspecError:
        async with serving(serve) as channel:
            with pytest.raises(Incompatible) as caught:
                await collect(channel, mover)
            return caught.value

    error = asyncio.run(run())
    assert (error.field, error.remedy) == ("fingerprint.kv", "use the same dtype")


def test_a_stream_without_done_is_never_complete(mover: str) -> None:
    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        await stream.send(pages(1))

    async def run() -> None:
        async with serving(serve) as channel:
            with pytest.raises(PeerLost, match="before Done"):
                await collect(channel, mover)

    asyncio.run(run())


def test_an_exception_of_the_service_is_internal_and_names_no_secret(mover: str) -> None:
    async def serve(stream: PrefillStream) -> None:
        raise RuntimeError("secret")

    async def run() -> None:
        async with serving(serve) as channel:
            with pytest.raises(PdspecError) as caught:
                await collect(channel, mover)
            assert "secret" not in str(caught.value) and "RuntimeError" in str(caught.value)

    asyncio.run(run())


def test_nobody_there() -> None:
    async def run() -> None:
        channel = make_channel("127.0.0.1:1")
        with pytest.raises(PeerLost, match="p0"):
            await collect(channel, "grpc", peer="p0")
        await channel.close()

    asyncio.run(run())


def test_leaving_the_block_cancels_the_server_side() -> None:
    cancelled = asyncio.Event()

    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def run() -> None:
        async with serving(serve) as channel:
            async with PrefillCall(channel, OPEN) as call:
                async for frame in call:
                    assert frame.kind == "begin"
                    break
            await asyncio.wait_for(cancelled.wait(), 10.0)

    asyncio.run(run())


@pytest.mark.parametrize("data", [b"", b"\xff\xff", frames.Credit(epoch=1, bytes=1).to_bytes()])
def test_a_stream_that_does_not_open_is_refused(data: bytes) -> None:
    async def serve(stream: PrefillStream) -> None:
        raise AssertionError("must not be reached")

    async def run() -> grpc.StatusCode:
        async with serving(serve) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(data)
            await call.done_writing()
            return await call.code()

    assert asyncio.run(run()) is grpc.StatusCode.DATA_LOSS


async def _read(call: grpc.aio.StreamStreamCall) -> bool:
    try:
        return await call.read() is not grpc.aio.EOF
    except grpc.RpcError:
        return False


def test_a_damaged_frame_from_the_receiver_ends_the_stream() -> None:
    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        for start in range(20):
            await stream.send(pages(1, start))

    async def run() -> grpc.StatusCode:
        async with serving(serve) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(dataclasses.replace(OPEN, credit=1500).to_bytes())
            await call.write(b"garbage")
            while await _read(call):
                pass
            return await call.code()

    assert asyncio.run(run()) is grpc.StatusCode[TransferDamaged.status]
