"""Streams that would never end: the side that waits cuts them."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest
from prefill_streams import OPEN, begin, collect, pages, serving

from pdspec.errors import PeerLost, TransferDamaged
from pdspec.transfer import frames, grpc_serve, ledger
from pdspec.transfer.grpc_serve import PrefillStream
from pdspec.transfer.grpc_stream import METHOD


def test_a_peer_that_is_busy_for_ever_is_cut() -> None:
    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        await asyncio.sleep(30)

    async def run() -> None:
        async with serving(serve, steps=itertools.count().__next__, alive_s=0.05) as channel:
            with pytest.raises(PeerLost, match=r"not done after 0\.5 s"):
                await asyncio.wait_for(collect(channel, "grpc", total_timeout_s=0.5), 10)

    asyncio.run(run())


@pytest.mark.parametrize("frame", [begin(), frames.First(epoch=0, token_id=4)])
def test_what_comes_once_comes_once(frame) -> None:
    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        while True:
            await stream.send(frame)

    async def run() -> None:
        async with serving(serve) as channel:
            with pytest.raises(TransferDamaged, match=f"a second {type(frame).__name__}"):
                await asyncio.wait_for(collect(channel, "grpc"), 10)

    asyncio.run(run())


def test_frames_of_other_epochs_have_an_end(monkeypatch) -> None:
    monkeypatch.setattr(ledger, "MAX_DROPPED", 20)

    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        while True:
            await stream._write(frames.Alive(epoch=99, steps=1))

    async def run() -> None:
        async with serving(serve) as channel:
            with pytest.raises(TransferDamaged, match="21 frames of other epochs"):
                await asyncio.wait_for(collect(channel, "grpc"), 10)

    asyncio.run(run())


def test_a_decode_worker_that_sends_without_end_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(grpc_serve, "MAX_UNASKED", 20)
    told: list[Exception] = []

    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        try:
            for start in range(10_000):
                await stream.send(pages(1, start))
                await asyncio.sleep(0.05)
        except TransferDamaged as error:
            told.append(error)
            raise

    async def run() -> grpc.StatusCode:
        async with serving(serve) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(OPEN.to_bytes())
            reading = asyncio.ensure_future(_drain(call))  # gRPC keeps the status back behind messages
            credit = frames.Credit(epoch=7, bytes=1000).to_bytes()
            try:
                async with asyncio.timeout(10):
                    while not told:
                        await call.write(credit)
                    return await call.code()
            except (grpc.RpcError, asyncio.InvalidStateError):
                return await call.code()
            finally:
                call.cancel()
                await reading

    assert asyncio.run(run()) is grpc.StatusCode.DATA_LOSS
    assert "frames for" in str(told[0])


async def _drain(call: grpc.aio.StreamStreamCall) -> None:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.RpcError:
        return
