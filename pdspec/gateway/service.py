"""The routes of OpenAI's API, and how the process is started.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/{model}   GET /health   GET /live

A request becomes one Generate call per choice. What the router sends is passed on as it comes; a client that goes away
ends its handler, and with it every call. Tokens (``Authorization: Bearer …``) are passed through: the router decides.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from pdspec.async_client import AsyncRouterClient
from pdspec.client import Access, Collected
from pdspec.config import HttpConfig
from pdspec.errors import ConfigError, InvalidRequest, PdspecError, Unauthenticated, UnknownName
from pdspec.gateway import refusals
from pdspec.gateway.choices import together
from pdspec.gateway.requests import Asked, chat_request, completion_request
from pdspec.gateway.shapes import Shapes
from pdspec.metrics import HttpMetrics, exposed
from pdspec.telemetry import REQUEST_ID
from pdspec.wire.serving import ServiceThread

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Parse = Callable[[Any, str], Asked]


@dataclass(kw_only=True)
class Gateway:
    """The handlers. ``address`` is where it listens, once it does."""

    config: HttpConfig
    client: AsyncRouterClient
    metrics: HttpMetrics
    address: str = ""
    grace_s: float = 0.0
    running: int = 0  # requests

    def app(self) -> web.Application:
        """Routes and what stands around them."""
        app = web.Application(middlewares=[self._around], client_max_size=self.config.max_body_bytes)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.completion)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model:.+}", self.model)
        app.router.add_get("/health", self.health)
        app.router.add_get("/live", self.live)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """A turn of a conversation."""
        limit = self.config.max_tokens
        return await self._answer(request, "chatcmpl", lambda body, name: chat_request(
            body, max_tokens=limit, request_id=name))  # fmt: skip

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """What comes after a text or token ids."""
        return await self._answer(request, "cmpl", lambda body, name: completion_request(body, request_id=name))

    async def models(self, request: web.Request) -> web.StreamResponse:
        """The models of the deployment: one."""
        return web.json_response({"object": "list", "data": await self._models(request)})

    async def model(self, request: web.Request) -> web.StreamResponse:
        """One of them."""
        found, name = await self._models(request), request.match_info["model"]
        for model in found:
            if model["id"] == name:
                return web.json_response(model)
        known = ", ".join(model["id"] for model in found) or "none"
        raise UnknownName(f"no model {name!r} is deployed", field="model", remedy=f"deployed: {known}")

    async def health(self, request: web.Request) -> web.StreamResponse:
        """200 while the router has a decode worker that is ready, else 503."""
        ready = await self.client.healthy()
        return web.json_response({"status": "ready" if ready else "not ready"}, status=200 if ready else 503)

    async def live(self, request: web.Request) -> web.StreamResponse:
        """200 while this process answers at all."""
        return web.json_response({"status": "live"})

    async def _models(self, request: web.Request) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for worker in await self.client.workers(token=_token(request)):
            if worker["model"]:
                found[worker["model"]] = {
                    "id": worker["model"], "object": "model", "created": 0, "owned_by": "pdspec",
                    "max_model_len": worker["max_context"],
                }  # fmt: skip
        return list(found.values())

    async def _answer(self, request: web.Request, prefix: str, parse: Parse) -> web.StreamResponse:
        name, token = f"{prefix}-{uuid.uuid4().hex}", _token(request)
        REQUEST_ID.set(name)
        asked = parse(await _json(request), name)
        shapes = Shapes(asked=asked, name=name, model=asked.requests[0].model)
        streams = [self.client.stream(one, token=token) for one in asked.requests]
        async with aclosing(together(streams)) as pieces:
            if asked.stream:
                return await self._stream(request, shapes, pieces)
            answers = [Collected() for _ in streams]
            async for index, piece in pieces:
                answers[index].add(piece)
        whole = shapes.whole([one.answer() for one in answers])
        return web.json_response(whole, headers={"X-Request-Id": name})

    async def _stream(self, request: web.Request, shapes: Shapes, pieces: AsyncIterator) -> web.StreamResponse:
        """Server-sent events. What goes wrong before the first token still has a status of its own; later it is an
        event, and no ``[DONE]`` follows."""
        first = await anext(pieces)
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache",
                   "X-Accel-Buffering": "no", "X-Request-Id": shapes.name}  # fmt: skip
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for index in range(len(shapes.asked.requests)):
            await _send(response, shapes.begin(index))
        try:
            await _send(response, shapes.piece(*first))
            async for index, piece in pieces:
                await _send(response, shapes.piece(index, piece))
            if shapes.asked.include_usage:
                await _send(response, [shapes.usage_chunk()])
            await response.write(b"data: [DONE]\n\n")
        except PdspecError as error:
            log.warning("%s broke off: %s", shapes.name, error)
            self.metrics.broken.labels(type(error).__name__).inc()
            await _send(response, [refusals.body_of(error)])
        await response.write_eof()
        return response

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors in OpenAI's shape, counted like everything else."""
        began, resource = time.perf_counter(), request.match_info.route.resource
        route = resource.canonical if resource else "unknown"
        status = 499  # nginx's, for a client that went away
        self.running += 1
        try:
            response = await self._shaped(request, handler)
            status = response.status
            return response
        finally:
            self.running -= 1
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _shaped(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except PdspecError as error:
            body, status = refusals.body_of(error), refusals.status_of(error)
            return web.json_response(body, status=status, headers=refusals.headers_of(error))
        except web.HTTPException as error:  # no such route or method, a body that is too large
            body = refusals.shape(error.reason, "invalid_request_error", code=f"http_{error.status}")
            kept = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
            return web.json_response(body, status=error.status, headers=kept)
        except ConnectionResetError:
            raise  # nobody is there to be told
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            body = refusals.shape("unexpected error; see the log of the HTTP front", "server_error", code="internal")
            return web.json_response(body, status=500)


@asynccontextmanager
async def serving(config: HttpConfig) -> AsyncIterator[Gateway]:
    """Serve while the block runs. Raises ConfigError for files that cannot be read and for a port that is taken. The
    router need not be there yet."""
    client = AsyncRouterClient(config.router, Access(tls=config.tls))
    gateway = Gateway(config=config, client=client, metrics=HttpMetrics())
    # A handler is cancelled when its client goes away: that is what ends the calls to the router.
    runner = web.AppRunner(gateway.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    try:
        await runner.setup()
        site = web.TCPSite(runner, config.host or None, config.port, ssl_context=_tls(config))
        try:
            await site.start()
        except OSError as error:
            message = f"cannot listen on {config.host}:{config.port}: {error.strerror}"
            remedy = "stop what holds the port, or choose another (0: any free one)"
            raise ConfigError(message, field="port", remedy=remedy) from error
        host, port = runner.addresses[0][:2]
        gateway.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with exposed(gateway.metrics, host=config.host, port=config.metrics_port):
            yield gateway
            await _drained(gateway, site)
    finally:
        await runner.cleanup()
        await client.close()


async def _drained(gateway: Gateway, site: web.TCPSite) -> None:
    """Nobody new is let in; requests under way may end."""
    await site.stop()
    until = time.monotonic() + gateway.grace_s
    while gateway.running and time.monotonic() < until:
        await asyncio.sleep(0.05)


def launch(config: HttpConfig) -> ServiceThread[Gateway]:
    """Start the front on a thread of this process. Raises what ``serving`` raises."""
    return ServiceThread(lambda: serving(config), name="http")


def _tls(config: HttpConfig) -> ssl.SSLContext | None:
    if not config.cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.cert, config.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot use {config.cert}: {error}", field="cert", remedy="give PEM files") from error
    return context


async def _json(request: web.Request) -> Any:
    try:
        async with asyncio.timeout(30):
            return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("not valid JSON", field="body", remedy="send one JSON object") from error
    except TimeoutError:
        raise InvalidRequest("no whole body after 30 s", field="body", remedy="send it at once") from None


def _token(request: web.Request) -> str:
    """What the user shows, for the router to judge. Empty for nothing."""
    header = request.headers.get("Authorization", "")
    if not header.isascii() or not header.isprintable():
        remedy = "send 'Authorization: Bearer TOKEN' in ASCII"
        raise Unauthenticated("not a token", field="authorization", remedy=remedy)
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def _send(response: web.StreamResponse, objects: list[dict[str, Any]]) -> None:
    if objects:
        await response.write(b"".join(b"data: %s\n\n" % _dumped(one) for one in objects))


def _dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
