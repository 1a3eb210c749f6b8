"""gRPC channels and servers with the options that this project's traffic needs."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdspec.errors import ConfigError
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire.gate import Gate
from pdspec.wire.interceptors import ErrorInterceptor
from pdspec.wire.trust import OPEN, Trust

MAX_MESSAGE_BYTES = 32 << 20  # transport limit between workers; a frame stays far below
MAX_CALLS = 8192  # at once on one server; beyond it RESOURCE_EXHAUSTED
USER_MESSAGE_BYTES = 4 << 20  # a user's request: a million token ids
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER = (
    # A silent prefill is no ping flood. The key has no "recv" in it; the one that has is ignored in silence.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),  # otherwise two servers share a taken port in silence
    ("grpc.max_concurrent_streams", 1024),  # of one connection; more wait on the other side
    ("grpc.server_handshake_timeout_ms", 5_000),  # a peer that connects and says nothing
    ("grpc.max_metadata_size", 16 << 10),
)
_CLIENT = (
    ("grpc.enable_http_proxy", 0),  # workers speak to workers
    ("grpc.enable_retries", 0),  # the router's own policy decides
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


_USER = (
    ("grpc.enable_retries", 0),  # the client itself asks for the rest of an answer
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 500),
)


def size_options(max_bytes: int) -> tuple[tuple[str, int], ...]:
    """Both directions; gRPC's own default would be 4 MiB for what is received."""
    return (("grpc.max_send_message_length", max_bytes), ("grpc.max_receive_message_length", max_bytes))


def make_channel(
    address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES, trust: Trust = OPEN
) -> grpc.aio.Channel:
    """A lazy channel to ``host:port``; calls on it carry ``metadata=trust.metadata()``. The caller closes it, and
    cancels every call in ``finally``: since grpcio 1.83 an abandoned call is never cancelled (grpc#43462)."""
    options = (*_KEEPALIVE, *_CLIENT, *size_options(max_message_bytes), *trust.channel_options())
    credentials = trust.channel_credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def make_client_channel(endpoint: str, trust: Trust = OPEN) -> grpc.Channel:
    """A user's blocking channel to a router. The caller closes it."""
    options, credentials = _user_options(trust), trust.channel_credentials()
    if credentials is None:
        return grpc.insecure_channel(endpoint, options=options)
    return grpc.secure_channel(endpoint, credentials, options=options)


def make_async_client_channel(endpoint: str, trust: Trust = OPEN) -> grpc.aio.Channel:
    """The same for asyncio; within an event loop."""
    options, credentials = _user_options(trust), trust.channel_credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(endpoint, options=options)
    return grpc.aio.secure_channel(endpoint, credentials, options=options)


def _user_options(trust: Trust) -> tuple[tuple[str, int | str], ...]:
    return (*size_options(USER_MESSAGE_BYTES), *_USER, *trust.channel_options())


def make_server(
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    max_request_bytes: int = 0,
    interceptors: Sequence = (),
    gate: Gate | None = None,
) -> grpc.aio.Server:
    """A server with the error interceptor outermost; it asks ``gate`` first (None: everybody may call). Call within an
    event loop. ``max_request_bytes`` bounds one unary request with a clear error; ``max_message_bytes`` is the
    transport's limit and answers RESOURCE_EXHAUSTED."""
    return grpc.aio.server(
        interceptors=(ErrorInterceptor(max_request_bytes=max_request_bytes, gate=gate or Gate()), *interceptors),
        maximum_concurrent_rpcs=MAX_CALLS,
        options=(*_KEEPALIVE, *_SERVER, *size_options(max_message_bytes)),
    )


def bind(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Listen on ``host:port`` (0: any free port), in plain text without ``credentials``. Returns the address with the
    real port. Raises ConfigError naming the port when it is taken or the host is not ours."""
    name = f"[{host}]" if ":" in host and not host.startswith("[") else host
    try:
        if credentials is None:
            bound = server.add_insecure_port(f"{name}:{port}")
        else:
            bound = server.add_secure_port(f"{name}:{port}", credentials)
    except RuntimeError as error:
        raise _taken(name, port) from error
    if bound == 0:
        raise _taken(name, port)
    return f"{name}:{bound}"


async def add_health(server: grpc.aio.Server, services: Sequence[str]) -> health.aio.HealthServicer:
    """Register ``grpc.health.v1`` (all ``services``, and "" for the server, start as SERVING) and reflection.

    ``services`` are full names such as ``service_name("Router")``. On shutdown ``await
    servicer.enter_graceful_shutdown()`` tells everyone NOT_SERVING.
    """
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ("", *services):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return servicer


def service_name(short: str) -> str:
    """``pdspec.v1.Router`` for ``Router``. Raises KeyError for a service the proto does not have."""
    return pb.DESCRIPTOR.services_by_name[short].full_name


def _taken(host: str, port: int) -> ConfigError:
    message = f"cannot listen on {host}:{port}: the port is taken or the host is not an address of this machine"
    return ConfigError(message, field="port", remedy="stop what holds the port, or choose another (0: any free one)")
