"""One answer on a decode worker, from its reservation to the running batch: which prefill workers are tried, what of
their stream is used, what is rebuilt, and what all that took."""

from __future__ import annotations

import dataclasses
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from decode_worker.answer import Answer
from decode_worker.handoff import Handed, Landing
from decode_worker.metrics import Moments, handoff_counted, trace
from pdspec.engine.claims import entered
from pdspec.engine.prefix import Prefix
from pdspec.errors import Overloaded, PdspecError, PeerLost, TransferDamaged
from pdspec.sampling import stopping_ids
from pdspec.spec.protocol import Drafter
from pdspec.transfer.frames import Open
from pdspec.transfer.grpc_stream import PrefillCall, relay_metadata
from pdspec.transfer.ledger import HIDDEN
from pdspec.types import DraftPrefill, FinishReason, GenerationStats, Handoff, Route, TokenChunk, TokenLogprob

if TYPE_CHECKING:
    from decode_worker.service import DecodeService

log = logging.getLogger(__name__)
RETRYABLE = (PeerLost, TransferDamaged, Overloaded)
COUNTED = ("prefill_failures", "local_prefills", "draft_rebuilds", "waited_for_pages")  # in Status, since the start


class Run:
    """Brings one answer from its reservation to the running batch, and knows what that took."""

    def __init__(self, service: DecodeService, answer: Answer, route: Route) -> None:
        self.service, self.answer, self.route = service, answer, route
        self.handed = Handed()
        self.retries = self.rebuilds = 0
        self.moments = Moments()
        self._left = self._filled = False

    def leave(self) -> None:
        """The stream has ended; pages are free once nothing lands any more."""
        trace(self.service.tracer, self.answer, self.moments, self.handed)
        self._left = True
        if self.answer.prompt is not None:
            self.answer.prompt.abandoned = True
        self._release()

    def end(self) -> None:
        """Nothing lands any more; pages are free once the stream has ended."""
        self._filled = True
        self._release()

    def _release(self) -> None:
        if self._left and self._filled:
            self.service.engine.post(self._released)

    def _released(self) -> None:
        """On the engine thread, where nobody changes the counts meanwhile."""
        self.service.host.release(self.answer)
        if self.answer.sequence is not None:
            self.service.metrics.answer(self.answer.sequence.stats())

    async def fill(self) -> None:
        """Errors go to the answer's queue: its coroutine raises them."""
        try:
            engine, host, answer = self.service.engine, self.service.host, self.answer
            await entered(engine, partial(host.enter, answer))
            self.service.counts["waited_for_pages"] += not answer.pages
            await answer.room
            metrics = self.service.metrics
            metrics.queue.observe(answer.granted_at - answer.queued_at)
            metrics.replays.inc(answer.request.replayed > 0)
            if not self.route.prefill or answer.missing <= self.service.config.local_prefill:
                metrics.local.inc()
                self.service.counts["local_prefills"] += bool(self.route.prefill)
                await engine.call(lambda: host.prefill_here(answer))
                return
            handed = await self._handoff()
            if handed is None:
                return
            self.handed = handed
            self.moments.join()
            if not handed.draft_damage:
                log.debug("landed whole epoch=%d", handed.epoch)
            damage = handed.draft_damage or await engine.call(lambda: host.join(answer, handed))
            if damage:
                log.warning("draft state is rebuilt: %s", damage, extra={"request_id": answer.request.request_id})
                self.rebuilds += 1
                metrics.rebuilds.inc()
                self.service.counts["draft_rebuilds"] += 1
                await engine.call(lambda: host.prefill_here(answer))
        except Exception as error:  # noqa: BLE001  whatever it is, the stream must end with it
            self.answer.queue.put_nowait(error)

    async def _handoff(self) -> Handed | None:
        """Try the prefill workers in the route's order. None when there is nothing left to join."""
        policy, links, route = self.service.config.on_prefill_failure, self.service.links, self.route
        failures: list[str] = []
        addresses = sorted(route.prefill, key=lambda address: links.is_down(route.link(address)))
        for address in addresses if policy != "fail" else addresses[:1]:
            try:
                handed = await self._receive(address)
                links.up(route.link(address))
                return handed
            except RETRYABLE as error:
                if isinstance(error, PeerLost):
                    links.fail(route.link(address))
                self.service.counts["prefill_failures"] += 1
                log.warning(
                    "prefill on %s failed: %s", address, error, extra={"request_id": self.answer.request.request_id}
                )
                failures.append(f"{address}: {error}")
                self.retries += 1
                self.service.metrics.retries.inc()
        if policy == "local":
            self.service.metrics.local.inc()
            answer, host = self.answer, self.service.host
            self.service.counts["local_prefills"] += 1
            await self.service.engine.call(lambda: host.prefill_here(answer))
            return None
        raise PeerLost("no prefill worker could serve this request: " + "; ".join(failures), remedy="try again")

    async def _receive(self, address: str) -> Handed | None:
        answer, service, config = self.answer, self.service, self.service.config
        resources = service.host.resources
        mode = DraftPrefill(answer.request.draft_prefill or config.draft_prefill)
        relayed = self.route.handoff is Handoff.RELAY
        offer = service.offers.through_relay() if relayed else await service.offers.offer(address)
        have = have_rows(resources.runner.group.name, answer.prefix, answer.drafter, mode)
        opening = Open(
            epoch=service.next_epoch(),
            have_rows=have,
            # This worker's default tree, not the peer's, and what is left of the time.
            request=dataclasses.replace(answer.request, tree=answer.ctx.tree, deadline_s=answer.left_s()),
            drafter=answer.drafter.name,
            draft_prefill=mode.value,
            fingerprint=resources.fingerprint,
            worker_id=service.worker_id,
            segment=offer.text,
        )
        landing = Landing(
            resources=resources,
            pages=answer.pages,
            rows=answer.ctx.prompt_len if answer.request.sampling.max_tokens > 1 else 0,
            drafter=answer.drafter,
            draft_prefill=mode,
            on_first=self._first,
            have_rows=have,
        )
        channel = service.channel(self.route.relay if relayed else address)
        metadata = (*service.trust.metadata(), *(relay_metadata(address) if relayed else ()))
        async with PrefillCall(
            channel, opening, stall_timeout_s=config.stall_timeout_s, peer=address, metadata=metadata,
            total_timeout_s=config.handoff_timeout_s, offer=offer,
        ) as call:  # fmt: skip
            try:
                landing.handed.epoch, began = opening.epoch, time.perf_counter()
                with handoff_counted(service.metrics, landing.handed):
                    handed = await landing.receive(call)
                if handed is not None:
                    self._measured(self.route.link(address), handed, time.perf_counter() - began)
                return handed
            finally:
                self.handed = landing.handed

    def _measured(self, link: str, handed: Handed, seconds: float) -> None:
        """What a whole handoff says of its link."""
        stats, answer = handed.stats, self.answer
        self.service.links.carried(
            link, moved=handed.kv_bytes + handed.draft_kv_bytes + handed.hidden_bytes,
            tokens=answer.ctx.prompt_len - answer.prefix.rows, seconds=seconds,
            queue=stats.get("queue_ms", 0.0) / 1e3, prefill=stats.get("prefill_ms", 0.0) / 1e3,
            sending=stats.get("sending_ms", 0.0) / 1e3,
        )  # fmt: skip

    def _first(self, token_id: int, logprob: TokenLogprob | None) -> bool:
        """Give t_n to the client at once, unless it has it. False when it ends the answer."""
        answer, params = self.answer, self.answer.request.sampling
        stops = token_id in stopping_ids(params, self.service.host.resources.end_ids)
        finish = FinishReason.STOP if stops else FinishReason.LENGTH if params.max_tokens <= 1 else None
        if answer.first_sent >= 0:
            if answer.first_sent != token_id:
                raise PdspecError("a repeated prefill chose another first token", remedy="use numerics exact")
            return finish is None
        answer.first_sent = token_id
        alone = GenerationStats(prompt_tokens=answer.ctx.prompt_len, output_tokens=1, drafter=answer.drafter.name)
        answer.put(
            TokenChunk(
                request_id=answer.request.request_id,
                start=0,
                token_ids=(token_id,),
                logprobs=(logprob,) if logprob else (),
                finish_reason=finish,
                stop_match=str(token_id) if stops else "",
                stats=alone if finish else None,
            )
        )
        return finish is None

    def complete(self, chunk: TokenChunk) -> TokenChunk:
        """The last chunk, with what the handoff took."""
        answer, handed = self.answer, self.handed
        stats = dataclasses.replace(
            chunk.stats or GenerationStats(),
            kv_bytes=handed.kv_bytes,
            draft_kv_bytes=handed.draft_kv_bytes,
            hidden_bytes=handed.hidden_bytes,
            prefill_worker=handed.prefill_worker or self.service.worker_id,
            decode_worker=self.service.worker_id,
            handoff=self.route.handoff.value if self.route.prefill and handed.epoch else "none",
            queue_ms=1e3 * (answer.granted_at - answer.queued_at) + handed.stats.get("queue_ms", 0.0),
            prefill_ms=handed.stats.get("prefill_ms", 1e3 * answer.prompt.seconds if answer.prompt else 0.0),
            transfer_exposed_ms=handed.exposed_ms,
            cached_tokens=answer.prefix.rows,
            prefill_cached_tokens=int(handed.stats.get("cached_tokens", 0.0)),
            draft_rebuilds=self.rebuilds,
            prefill_retries=self.retries,
        )
        return dataclasses.replace(chunk, stats=stats)


def have_rows(target: str, prefix: Prefix, drafter: Drafter, mode: DraftPrefill) -> dict[str, int]:
    """What the prefill worker need not send: rows by group, draft rows that read the token behind the cached ones not
    among them; where the drafter is prefilled here, the first hidden row that is needed, too."""
    if not prefix.rows:
        return {}
    if mode is DraftPrefill.DECODE:
        return {target: prefix.rows, HIDDEN: prefix.start}
    return {target: prefix.rows, **drafter.rows_at(prefix.rows - 1)}
