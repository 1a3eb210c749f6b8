"""One server interceptor: typed errors become gRPC statuses, broken messages never reach a service.

It parses requests itself, so that malformed protobuf and oversized messages are InvalidRequest like any other bad
input (gRPC alone answers with an unexplained UNKNOWN).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from pdspec.errors import InvalidRequest, PdspecError
from pdspec.wire.gate import Gate
from pdspec.wire.status import code_of, details_of, from_rpc_error, trailing_metadata

log = logging.getLogger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every asynchronous handler of a server. ``max_request_bytes`` bounds one parsed request message
    (0: no bound but the transport's). ``gate`` is asked before a message is read.

    Unary requests are read here, as streams of one message: gRPC itself would wait for ever for a caller that opens a
    call and sends nothing, and would read the request of one that may not call.
    """

    def __init__(self, *, max_request_bytes: int = 0, gate: Gate) -> None:
        self._max_request_bytes, self._gate = max_request_bytes, gate

    async def intercept_service(self, continuation, handler_call_details):  # type: ignore[no-untyped-def]
        """The handler of a call, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = "stream" if handler.request_streaming else "unary"
        kind += "_stream" if handler.response_streaming else "_unary"
        behaviour = getattr(handler, kind)
        many, one = grpc.stream_stream_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        make = many if handler.response_streaming else one
        parse = None if handler.request_streaming else handler.request_deserializer
        keep = handler.request_deserializer if handler.request_streaming else None
        wrapped = self._wrap(behaviour, handler.request_streaming, parse, handler_call_details.method)
        if wrapped is None:
            return handler
        return make(wrapped, request_deserializer=keep, response_serializer=handler.response_serializer)

    def _wrap(self, behaviour: Callable, streams: bool, parse: Callable | None, method: str) -> Callable | None:
        if inspect.isasyncgenfunction(behaviour):

            async def generate(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                message = None
                try:
                    self._gate.enter(method, context)
                    message = requests if streams else self._parse(await self._only(requests), parse)
                    async with aclosing(behaviour(message, context)) as answers:
                        async for answer in answers:
                            yield answer
                except Exception as error:  # noqa: BLE001  every error of a service ends here, as a status
                    await abort(context, error, method, message)

            return generate
        if inspect.iscoroutinefunction(behaviour):

            async def call(requests: Any, context: grpc.aio.ServicerContext) -> Any:
                message = None
                try:
                    self._gate.enter(method, context)
                    message = requests if streams else self._parse(await self._only(requests), parse)
                    return await behaviour(message, context)
                except Exception as error:  # noqa: BLE001  every error of a service ends here, as a status
                    await abort(context, error, method, message)

            return call
        return None  # a plain function: gRPC runs it in a thread, and none of ours is one

    async def _only(self, requests: AsyncIterator[Any]) -> Any:
        """The message of a unary request. Raises InvalidRequest when it does not come, whole and in time."""
        limit = self._gate.request_timeout_s
        try:
            async with asyncio.timeout(limit):
                return await anext(requests)
        except TimeoutError:
            message = f"no whole request after {limit:g} s"
            raise InvalidRequest(message, field="request", remedy="send the request with the call") from None
        except StopAsyncIteration:
            raise InvalidRequest("the call ended without one", field="request", remedy="send one message") from None

    def _parse(self, request: Any, parse: Callable | None) -> Any:
        if parse is None:
            return request
        name = getattr(getattr(parse, "__self__", None), "__name__", "request")
        if 0 < self._max_request_bytes < len(request):
            remedy = "shorten the prompt or raise max_message_bytes"
            message = f"message of {len(request)} bytes is above the limit of {self._max_request_bytes}"
            raise InvalidRequest(message, field=name, remedy=remedy)
        try:
            return parse(request)
        except DecodeError as error:
            remedy = "compile your client from proto/pdspec.proto"
            raise InvalidRequest("not a valid protobuf message", field=name, remedy=remedy) from error


async def abort(context: grpc.aio.ServicerContext, error: Exception, method: str, request: Any) -> None:
    """End the call with the status of ``error``; unknown exceptions are logged with the request's id and hidden
    behind INTERNAL. Always raises (gRPC's AbortError)."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error)
    if not isinstance(error, PdspecError):
        request_id = _request_id(request)
        log.error("%s failed, request %s", method, request_id, exc_info=error)
        text = f"unexpected {type(error).__name__} in request {request_id}"
        error = PdspecError(text, remedy="see the log of the worker")
    await context.abort(code_of(error), details_of(error), trailing_metadata(error))


def _request_id(request: Any) -> str:
    for message in (request, getattr(request, "request", None)):
        if isinstance(message, Message) and (name := getattr(message, "request_id", "")):
            return name
    return "(none)"
