"""What workers refuse, from clients and from peers: by status, field and remedy, with nothing left allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from pdspec.errors import Incompatible, InvalidRequest, PdspecError, PeerLost, TransferDamaged
from pdspec.transfer.frames import Begin, Open
from pdspec.transfer.grpc_stream import METHOD, PrefillCall
from tests.contract.around import channel_to, check_clean, status_of
from tests.parity.roles import Roles, held_by, request, run_client, running, wait_until


@pytest.fixture(scope="module")
def shared() -> Iterator[Roles]:
    with running(prefill={"chunk": 4, "stall_timeout_s": 0.5}) as roles:
        yield roles


@pytest.fixture
def roles(shared: Roles) -> Iterator[Roles]:
    yield shared
    check_clean(shared)


# --- decode workers that fail their prefill worker -------------------------------------------------------------------


def opening(roles: Roles, **changes: Any) -> Open:
    fingerprint = roles.prefill.engine.host.resources.fingerprint
    values = {"epoch": 5, "request": request(n=400), "drafter": "eagle3", "draft_prefill": "prefill"}
    return Open(**{**values, "fingerprint": fingerprint, **changes})


async def open_stream(address: str, frame: Open) -> list[str]:
    async with channel_to(address) as channel, PrefillCall(channel, frame, stall_timeout_s=3) as call:
        return [got.kind async for got in call]


@pytest.mark.parametrize(
    ("changes", "error", "field"),
    [
        ({"fingerprint": {}}, Incompatible, "fingerprint.target"),
        ({"draft_prefill": "sideways"}, InvalidRequest, "draft_prefill"),
        ({"request": request(n=0)}, InvalidRequest, "prompt_ids"),
        ({"request": request(n=3000)}, InvalidRequest, "prompt_ids"),
    ],
)
def test_an_open_that_cannot_be_served_is_refused_by_name(roles, changes, error, field):
    with pytest.raises(error) as caught:
        run_client(open_stream(roles.prefill.address, opening(roles, **changes)))
    assert caught.value.field == field


@pytest.mark.parametrize("data", [b"", b"\xff" * 30, Begin(epoch=1, rows={}).to_bytes()])
def test_a_stream_that_does_not_begin_with_open_is_refused(roles, data):
    async def scenario() -> PdspecError:
        async with channel_to(roles.prefill.address) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(data)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                while await call.read() is not grpc.aio.EOF:
                    pass
                raise AssertionError("it ended well")
            return caught.value

    assert run_client(scenario()).code() is grpc.StatusCode.DATA_LOSS


def test_a_decode_worker_that_takes_nothing_is_cut_and_its_pages_freed(roles):
    """Its credit is used up after a few rows, and none comes."""

    async def scenario() -> None:
        async with channel_to(roles.prefill.address) as channel:
            async with PrefillCall(channel, opening(roles, credit=2000), auto_grant=False, stall_timeout_s=5) as call:
                with pytest.raises(PeerLost, match="no credit"):
                    async for _ in call:
                        pass

    run_client(scenario())
    assert wait_until(lambda: held_by(roles.prefill) == 0)


def test_nonsense_in_the_middle_of_a_stream_ends_it(roles):
    async def scenario() -> None:
        async with channel_to(roles.prefill.address) as channel:
            async with PrefillCall(channel, opening(roles), stall_timeout_s=5) as call:
                await call._call.write(b"\xfe\xfe")
                with pytest.raises(TransferDamaged):
                    async for _ in call:
                        pass

    run_client(scenario())
    assert wait_until(lambda: held_by(roles.prefill) == 0)


# --- requests that cannot be served ----------------------------------------------------------------------------------

NAN = float("nan")
BAD = [
    ({"prompt_ids": ()}, {}, "prompt_ids"),
    ({"prompt_ids": (3, -1)}, {}, "prompt_ids"),
    ({"prompt_ids": tuple(range(200)) * 10}, {"max_tokens": 100}, "max_tokens"),
    ({}, {"max_tokens": 0}, "max_tokens"),
    ({}, {"max_tokens": -4}, "max_tokens"),
    ({}, {"temperature": -0.1}, "temperature"),
    ({}, {"temperature": NAN}, "temperature"),
    ({}, {"top_p": 0.0}, "top_p"),
    ({}, {"top_p": 1.01}, "top_p"),
    ({}, {"stop_ids": (9999,)}, "stop_ids"),
    ({"model": "gpt-99"}, {}, "model"),
    ({"draft_prefill": "router"}, {}, "draft_prefill"),
]


@pytest.mark.parametrize(("changes", "sampling", "field"), BAD)
def test_a_bad_request_is_refused_by_field_with_a_remedy(roles, changes, sampling, field):
    error = status_of(roles, dataclasses.replace(request(sampling=sampling), **changes))
    wanted = grpc.StatusCode.NOT_FOUND if field == "model" else grpc.StatusCode.INVALID_ARGUMENT
    assert error.code() is wanted and field in error.details() and "(" in error.details()


def test_a_request_that_is_no_protobuf_is_refused(roles):
    async def scenario() -> grpc.aio.AioRpcError:
        async with channel_to(roles.decode.address) as channel:
            call = channel.unary_stream("/pdspec.v1.DecodeWorker/Decode")(b"\xff\xff\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
                raise AssertionError("it was taken")
            return caught.value

    assert run_client(scenario()).code() is grpc.StatusCode.INVALID_ARGUMENT
