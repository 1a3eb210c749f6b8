"""The relay passes the Prefill stream through: same frames, same errors, cancels in both directions."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest

from pdspec.config import RouterConfig
from pdspec.errors import Incompatible, InvalidRequest, PeerLost
from pdspec.transfer import frames
from pdspec.transfer.grpc_serve import PrefillStream, prefill_handler
from pdspec.transfer.grpc_stream import PrefillCall, relay_metadata
from pdspec.types import GenerateRequest
from pdspec.wire.channels import bind, make_channel, make_server
from router.relay import Relay, serving

OPEN = frames.Open(
    epoch=7, request=GenerateRequest(request_id="r", prompt_ids=(1, 2)), drafter="none", draft_prefill="", credit=5000
)
Serve = Callable[[PrefillStream], Awaitable[None]]


@asynccontextmanager
async def relayed(serve: Serve) -> AsyncIterator[tuple[grpc.aio.Channel, str, grpc.aio.Server, Relay]]:
    """(channel to a relay, the prefill worker's address, its server, the relay)."""
    server = make_server()
    server.add_generic_rpc_handlers((prefill_handler(serve, steps=lambda: 0, alive_s=0.1),))
    target = bind(server, "127.0.0.1", 0)
    await server.start()
    async with serving(RouterConfig(port=0)) as relay:
        channel = make_channel(relay.address)
        try:
            yield channel, target, server, relay
        finally:
            await channel.close()
            await server.stop(0)


def pages(start: int) -> frames.Pages:
    payload = bytes([start]) * 1000
    return frames.Pages(
        epoch=0, seq=0, group="target", layer=0, start=start, count=1, head_start=0, head_count=1, payload=payload
    )


def begin() -> frames.Begin:
    return frames.Begin(epoch=0, rows={"target": 50})


async def collect(channel: grpc.aio.Channel, target: str) -> tuple[list, PrefillCall]:
    async with PrefillCall(channel, OPEN, metadata=relay_metadata(target), peer=target) as call:
        return [frame async for frame in call], call


def test_a_whole_handoff_with_credit_passes_through() -> None:
    async def serve(stream: PrefillStream) -> None:
        assert stream.open == OPEN
        await stream.send(begin())
        for start in range(50):
            await stream.send(pages(start))
        await stream.finish()

    async def scenario() -> None:
        async with relayed(serve) as (channel, target, *_):
            got, call = await collect(channel, target)
            call.ledger.check(got[-1])
            assert call.ledger.moved("target") == 50_000

    asyncio.run(scenario())


def test_a_typed_error_passes_through() -> None:
    async def serve(stream: PrefillStream) -> None:
        raise Incompatible("other kernels", field="fingerprint.kernel", remedy="same build")

    async def scenario() -> None:
        async with relayed(serve) as (channel, target, *_):
            with pytest.raises(Incompatible) as caught:
                await collect(channel, target)
            assert (caught.value.field, caught.value.remedy) == ("fingerprint.kernel", "same build")

    asyncio.run(scenario())


def test_a_cancel_passes_through() -> None:
    cancelled = asyncio.Event()

    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def scenario() -> None:
        async with relayed(serve) as (channel, target, *_):
            async with PrefillCall(channel, OPEN, metadata=relay_metadata(target)) as call:
                async for _frame in call:
                    break
            await asyncio.wait_for(cancelled.wait(), 10.0)

    asyncio.run(scenario())


def test_a_prefill_worker_that_dies_is_lost_to_the_decode_worker() -> None:
    async def serve(stream: PrefillStream) -> None:
        await stream.send(begin())
        await stream.send(pages(0))
        await asyncio.sleep(30)

    async def scenario() -> None:
        async with relayed(serve) as (channel, target, server, _relay):
            with pytest.raises(PeerLost):
                async with PrefillCall(channel, OPEN, metadata=relay_metadata(target), stall_timeout_s=3) as call:
                    async for frame in call:
                        if frame.kind == "pages":
                            await server.stop(0)

    asyncio.run(scenario())


def test_nobody_at_the_target_and_no_target() -> None:
    async def serve(stream: PrefillStream) -> None:
        raise AssertionError("must not be reached")

    async def scenario() -> None:
        async with relayed(serve) as (channel, *_):
            with pytest.raises(PeerLost, match=r"127\.0\.0\.1:1"):
                await collect(channel, "127.0.0.1:1")
            with pytest.raises(InvalidRequest, match="pdspec-target"):
                async with PrefillCall(channel, OPEN) as call:
                    async for _frame in call:
                        pass

    asyncio.run(scenario())


@pytest.mark.parametrize("module", ["router", "router.relay"])
def test_processes_say_ready_and_end_on_a_signal(module: str) -> None:
    command = [sys.executable, "-m", module, "--port", "0", "--model", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        role = module.rpartition(".")[2]
        assert process.stdout.readline().startswith(f"ready role={role} address=127.0.0.1:")
        process.terminate()
        assert process.wait(10) == 0


def test_the_router_loads_no_torch() -> None:
    code = "import sys, router.service, router.relay; print('torch' in sys.modules, 'transformers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]
