"""One answer, from routing to its last chunk.

    choose a worker ──▶ attempt ──chunks──▶ client
          ▲                │ lost before the first token: route anew
          └────────────────┘ lost later: replay prompt + what went out; seed and positions make it continue

A client whose stream broke with the router itself comes back with the tokens that it has: the same replay. What an
attempt is worth, and how often there is another, is for ``failover`` to say.

An answer that does not end with a finish reason ends with an error: it never looks complete when it is not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace

import grpc

from pdspec.answer_text import AnswerText
from pdspec.config import RouterConfig
from pdspec.errors import InvalidRequest, Overloaded, PdspecError, PeerLost
from pdspec.types import FinishReason, GenerateRequest, GenerationStats, Handoff, Route, TokenChunk, TokenLogprob
from pdspec.wire import pdspec_pb2 as pb
from pdspec.wire import pdspec_pb2_grpc as rpc
from pdspec.wire.codec import chunk_from_pb, decode_request_to_pb, generate_chunk_to_pb
from pdspec.wire.ids import bytes_to_ids
from pdspec.wire.passing import is_plain, passed_on
from pdspec.wire.status import from_peer_error, is_broken
from router.failover import Failures, WorkerDied
from router.fleet import Fleet, Ticket
from router.placement import Estimate
from router.policy import MAX_WAITING, RETRY_AFTER_MS, choose, placed
from router.prefixes import PrefixMap
from router.tally import Tally

log = logging.getLogger(__name__)
LOOK_S = 0.05  # between two looks at the fleet, where nobody can be chosen
END_TIMEOUT_S = 1.0  # for a worker to end its call after its last chunk


class _NotNow(Exception):
    """Nobody can be chosen, but a worker may come back."""


class Answer:
    """Iterate ``chunks()`` once. ``text`` is fresh; ``resumed`` are tokens that the client has already;
    ``on_placed`` hears how a prompt's place was chosen by measured times."""

    def __init__(
        self, request: GenerateRequest, *, fleet: Fleet, text: AnswerText, config: RouterConfig, handoff: Handoff,
        token_bytes: Callable[[int], bytes], resumed: tuple[int, ...] = (), prefixes: PrefixMap | None = None,
        on_placed: Callable[[Estimate], object] = lambda _: None,
    ) -> None:  # fmt: skip
        self._prefixes, self._cache_weight = PrefixMap() if prefixes is None else prefixes, config.cache_weight
        self._blocks: list[bytes] = []  # of the prompt that is routed
        self._request, self._fleet, self._text = request, fleet, text
        self._plain = not request.sampling.stop_strings  # then a chunk of tokens alone goes on as it is
        self._handoff, self._relay, self._token_bytes = handoff, config.relay, token_bytes
        self._measured, self._on_placed = config.prefill_choice == "measured", on_placed
        self._failures = Failures(config)
        self._began = time.monotonic()
        self._ids: list[int] = list(resumed)  # what went out
        self._stats: GenerationStats | None = None  # the last the worker sent
        self._tally = Tally()
        self._seed: int | None = request.sampling.seed

    async def chunks(self) -> AsyncGenerator[pb.GenerateChunk, None]:
        """What goes to the client. Raises PdspecError; closing it cancels the worker's call."""
        route = Route(decode="", prefill=(), handoff=self._handoff)
        if self._ids:  # their text went out with them
            self._tally.move()
            if stop := self._text.push(self._ids).stop_match:
                yield self._out(replace(self._empty(), stop_match=stop), route, finish=FinishReason.STOP, cut=True)
                return
        while True:
            request = self._remaining()
            if request.sampling.max_tokens <= 0:  # the last token came, the word that it was the last did not
                yield self._out(self._empty(), route, text=self._text.flush(), finish=FinishReason.LENGTH, cut=True)
                return
            self._blocks = self._keys(request.prompt_ids)
            route = await self._route(request)
            for address in (route.decode, *route.prefill[:1]):
                self._prefixes.note(self._blocks, address)
            try:
                async with aclosing(self._attempt(request, route)) as outgoing:
                    async for chunk in outgoing:
                        yield chunk
                return
            except (PeerLost, Overloaded) as error:
                log.warning("%s failed after %d tokens: %s", route.decode, len(self._ids), error)
                self._failures.note(route.decode, error, progress=len(self._ids) - request.replayed)
                if len(self._ids) > request.replayed:
                    self._tally.move()

    async def _route(self, request: GenerateRequest) -> Route:
        """Where to go; waits for a worker to come back where that may help."""
        since = time.monotonic()
        try:
            return self._choose(request, since)
        except _NotNow as error:
            if self._fleet.stranded >= MAX_WAITING and not self._ids:
                message = f"{self._fleet.stranded} requests wait for a worker to come back"
                raise Overloaded(message, retry_after_ms=RETRY_AFTER_MS, remedy="try again later") from error
        self._fleet.stranded += 1
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                with suppress(_NotNow):
                    return self._choose(request, since)
        finally:
            self._fleet.stranded -= 1

    def _choose(self, request: GenerateRequest, since: float) -> Route:
        """Raises _NotNow where a wait may help, else why nobody can be chosen."""
        views, tokens = self._fleet.views(), len(request.prompt_ids) + request.sampling.max_tokens
        found = self._prefixes.cached(self._blocks)
        cached = {address: count / len(request.prompt_ids) for address, count in found.items()}
        try:
            route = choose(
                views, handoff=self._handoff, relay=self._relay, tokens=tokens, drafter=request.drafter,
                exclude=self._failures.excluded(), cache_weight=self._cache_weight, cached=cached,
            )  # fmt: skip
            if not self._measured or not route.prefill:
                return route
            route, estimate = placed(views, route, prompt_tokens=len(request.prompt_ids), cached=cached)
            self._on_placed(estimate)
            return route
        except (PeerLost, Overloaded) as error:
            coming = any(view.may_return for view in views)
            since = since if views else self._fleet.began
            if self._failures.may_wait(error, since=since, coming=coming or not views, sent=bool(self._ids)):
                raise _NotNow from error
            raise self._given_up(error) from error

    def _given_up(self, error: PdspecError) -> PdspecError:
        last = self._failures.last
        if last is None or isinstance(error, Overloaded):
            return error
        if isinstance(last, Overloaded):
            return last
        sent = f" after {len(self._ids)} tokens" if self._ids else ""
        return PeerLost(f"the answer was lost{sent}: {last}; {error.message}", remedy=error.remedy)

    async def _attempt(self, request: GenerateRequest, route: Route) -> AsyncGenerator[pb.GenerateChunk, None]:
        count = len(request.prompt_ids)
        tickets = [self._fleet.send(address, count) for address in (route.decode, *route.prefill[:1])]
        stub = rpc.DecodeWorkerStub(self._fleet.channel(route.decode))
        call = stub.Decode(
            decode_request_to_pb(request, route), timeout=request.deadline_s, metadata=self._fleet.metadata()
        )
        base = len(self._ids)
        try:
            async with aclosing(_messages(call, tickets[0], route.decode)) as messages:
                async for message in messages:
                    if len(tickets) > 1 and tickets[1]:
                        tickets[1].close()  # its prefill is over
                    if self._plain and is_plain(message) and message.start == len(self._ids) - base > 0:
                        yield self._pass(message)
                        continue
                    chunk = _checked(message, expected=len(self._ids) - base, worker=route.decode)
                    out = self._take(chunk, route, first=chunk.start == 0)
                    yield out
                    if out.finish_reason:
                        if chunk.finish_reason:  # let the worker end its call itself; only a cut needs the cancel
                            await asyncio.wait({asyncio.ensure_future(call.code())}, timeout=END_TIMEOUT_S)
                        return
            raise PeerLost(f"{route.decode} ended the stream without a finish reason")
        except grpc.RpcError as error:
            raise self._failure(error, route) from error
        finally:
            call.cancel()
            self._prefixes.note(self._keys((*self._request.prompt_ids, *self._ids)), route.decode)
            for ticket in tickets:
                if ticket:
                    ticket.close()

    def _pass(self, message: pb.DecodeChunk) -> pb.GenerateChunk:
        """A chunk of tokens alone, as nearly all are, without the types between the two messages. Raises PeerLost."""
        try:
            ids = bytes_to_ids(message.token_ids, "token_ids")
        except InvalidRequest as error:
            raise PeerLost(f"the worker sent a chunk that does not parse: {error}") from error
        self._tally.add(len(ids), first=False)
        start, text = len(self._ids), self._text.push(ids).text
        self._ids += ids
        return passed_on(message, start=start, text=text)

    def _keys(self, token_ids: Sequence[int]) -> list[bytes]:
        return PrefixMap.keys(token_ids, self._request.cache_salt) if self._cache_weight else []

    def _take(self, chunk: TokenChunk, route: Route, *, first: bool) -> pb.GenerateChunk:
        self._stats = chunk.stats or self._stats
        self._tally.add(len(chunk.token_ids), first=first)
        piece = self._text.push(chunk.token_ids)
        if piece.stop_match:
            kept = replace(
                chunk,
                token_ids=chunk.token_ids[: piece.num_tokens],
                logprobs=chunk.logprobs[: piece.num_tokens],
                stop_match=piece.stop_match,
            )
            cut = chunk.finish_reason is None
            return self._out(kept, route, text=piece.text, finish=FinishReason.STOP, cut=cut)
        if chunk.finish_reason:
            return self._out(chunk, route, text=piece.text + self._text.flush(), finish=chunk.finish_reason)
        return self._out(chunk, route, text=piece.text)

    def _out(
        self, chunk: TokenChunk, route: Route, *, text: str = "", finish: FinishReason | None = None, cut: bool = False
    ) -> pb.GenerateChunk:
        start = len(self._ids)
        self._ids += chunk.token_ids
        stats = None
        if finish:
            stats = self._tally.finish(self._stats, self._request, route, output_tokens=len(self._ids), cut=cut)
        seed, self._seed = self._seed, None  # with the first chunk only
        whole = replace(
            chunk, start=start, request_id=self._request.request_id, finish_reason=finish, stats=stats,
            logprobs=tuple(self._spelled(entry) for entry in chunk.logprobs),
        )  # fmt: skip
        return generate_chunk_to_pb(whole, text=text, seed=seed)

    def _spelled(self, entry: TokenLogprob) -> TokenLogprob:
        top_texts = tuple(self._token_bytes(token) for token, _ in entry.top)
        return replace(entry, text=self._token_bytes(entry.token_id), top_texts=top_texts)

    def _empty(self) -> TokenChunk:
        return TokenChunk(request_id=self._request.request_id, start=0, token_ids=())

    def _remaining(self) -> GenerateRequest:
        """The request for the rest of the answer: what went out joins the prompt and counts as history."""
        sent, sampling = len(self._ids), self._request.sampling
        left = self._request.deadline_s
        if left is not None:
            left = max(0.001, left - (time.monotonic() - self._began))
        return replace(
            self._request,
            prompt_ids=(*self._request.prompt_ids, *self._ids),
            replayed=sent,
            deadline_s=left,
            sampling=replace(
                sampling,
                max_tokens=sampling.max_tokens - sent,
                stop_strings=(),  # matched here, on the text
            ),
        )

    def _failure(self, error: grpc.RpcError, route: Route) -> PdspecError:
        found = from_peer_error(error, peer=f"decode worker {route.decode}")
        if is_broken(error):
            self._fleet.lose(route.decode, f"failed a request: {error.code().name}")
            return WorkerDied(found.message, remedy=found.remedy)
        return found


async def _messages(
    call: grpc.aio.UnaryStreamCall, ticket: Ticket | None, address: str
) -> AsyncGenerator[pb.DecodeChunk, None]:
    """The call's messages. Raises WorkerDied as soon as heartbeats find the worker lost: that cancels the call, so that
    reading needs no task beside it (a third of what a chunk cost)."""
    lost = ticket.watch() if ticket else None
    if lost is not None:
        lost.add_done_callback(lambda _: call.cancel())
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            yield message
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if lost is None or not lost.done() or lost.cancelled() or (task is not None and task.cancelling()):
            raise
        raise WorkerDied(f"decode worker {address} {lost.result()}") from None


def _checked(message: pb.DecodeChunk, *, expected: int, worker: str) -> TokenChunk:
    try:
        chunk = chunk_from_pb(message)
    except InvalidRequest as error:
        raise PeerLost(f"{worker} sent a chunk that does not parse: {error}") from error
    if chunk.start != expected:
        raise PeerLost(f"{worker} sent tokens from {chunk.start} where {expected} was due")
    if chunk.finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
        raise PeerLost(f"{worker} ended the answer: {chunk.finish_reason.value}")
    return chunk
