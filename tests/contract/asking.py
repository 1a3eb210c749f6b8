"""What the tests of the router ask of it, and how they take its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
from fake_decode import TEXT, Cluster

from pdspec.types import SamplingParams, TokenChunk, UserRequest
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.codec import chunk_from_pb, user_request_to_pb
from pdspec.wire.status import from_rpc_error

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
