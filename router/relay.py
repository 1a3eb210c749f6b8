"""``python -m router.relay``: passes the Prefill stream through, for networks where workers cannot reach one another.

    decode worker ══ Prefill, metadata pdspec-target ══▶ relay ══ Prefill ══▶ prefill worker

Frames are bytes that nobody looks at. One frame at a time is held in each direction; what more may be under way is
the credit of the two ends. Whatever ends one side, a cancel, a half-close, a typed error, reaches the other.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from pdspec.config import RouterConfig
from pdspec.errors import InvalidRequest
from pdspec.metrics import RelayMetrics, exposed
from pdspec.transfer.grpc_stream import METHOD, SERVICE, TARGET_KEY
from pdspec.wire.channels import add_health, bind, make_channel, make_server
from pdspec.wire.gate import Gate
from pdspec.wire.serving import ServiceThread, serve_command
from pdspec.wire.status import from_peer_error
from pdspec.wire.trust import OPEN, Trust


class Relay:
    """The relay's service. ``address`` is where it listens, once it does."""

    def __init__(self, trust: Trust = OPEN) -> None:
        self.address, self.grace_s, self._trust, self._running = "", 0.0, trust, 0
        self.metrics = RelayMetrics(running=lambda: self._running)
        self._channels: dict[str, grpc.aio.Channel] = {}

    def handler(self) -> grpc.GenericRpcHandler:
        """For ``server.add_generic_rpc_handlers``."""
        method = grpc.stream_stream_rpc_method_handler(self.prefill)
        return grpc.method_handlers_generic_handler(SERVICE, {"Prefill": method})

    async def prefill(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """One Prefill stream. Raises InvalidRequest without a target, else what the prefill worker said."""
        target = dict(context.invocation_metadata() or ()).get(TARGET_KEY)
        if not isinstance(target, str) or not target:
            remedy = "name the prefill worker's host:port in the call's metadata"
            raise InvalidRequest("missing", field=TARGET_KEY, remedy=remedy)
        call = self._channel(target).stream_stream(METHOD)(metadata=self._trust.metadata())
        forward = asyncio.ensure_future(_forward(context, call))
        self._running += 1
        try:
            while (frame := await call.read()) is not grpc.aio.EOF:
                await context.write(frame)
                self.metrics.moved.inc(len(frame))
        except grpc.RpcError as error:
            self.metrics.lost.labels(error.code().name).inc()
            raise from_peer_error(error, peer=f"prefill worker {target}") from error
        finally:
            self._running -= 1
            forward.cancel()
            call.cancel()
            await asyncio.gather(forward, return_exceptions=True)

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()

    def _channel(self, target: str) -> grpc.aio.Channel:
        if target not in self._channels:
            self._channels[target] = make_channel(target, trust=self._trust)
        return self._channels[target]


async def _forward(context: grpc.aio.ServicerContext, call: grpc.aio.StreamStreamCall) -> None:
    """Decode worker → prefill worker: Open, credits, the half-close."""
    while (frame := await context.read()) is not grpc.aio.EOF:
        await call.write(frame)
    await call.done_writing()


@asynccontextmanager
async def serving(config: RouterConfig) -> AsyncIterator[Relay]:
    """Serve on ``config.host`` and ``config.port`` while the block runs. Raises ConfigError."""
    trust = Trust.of(config)
    server, relay = make_server(gate=Gate(trust)), Relay(trust)
    server.add_generic_rpc_handlers((relay.handler(),))
    servicer = await add_health(server, (SERVICE,))
    relay.address = bind(server, config.host, config.port, trust.server_credentials(members=True))
    with exposed(relay.metrics, host=config.host, port=config.metrics_port):
        await server.start()
        try:
            yield relay
        finally:
            await servicer.enter_graceful_shutdown()
            await server.stop(relay.grace_s)
            await relay.close()


def launch(config: RouterConfig) -> ServiceThread[Relay]:
    """Start the relay on a thread of this process. Raises ConfigError."""
    return ServiceThread(lambda: serving(config), name="relay")


def main(argv: list[str]) -> int:
    """The command line. Returns the exit status."""
    return serve_command(
        argv, RouterConfig, serving, role="relay", module="router.relay", description="Relay of the Prefill stream"
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
