"""What runs on a decode worker's engine thread: reservations, local prefills, and the one continuous batch."""

from __future__ import annotations

import asyncio
import logging
import time

from decode_worker.answer import Answer
from decode_worker.handoff import Handed
from decode_worker.parking import Parking
from decode_worker.scheduler import DecodeScheduler
from pdspec.config import WorkerConfig
from pdspec.engine.claims import Wake
from pdspec.engine.decode import DecodeEngine
from pdspec.engine.local import Kept, new_context
from pdspec.engine.prefill import PrefillEngine, PrefillSequence, prompt_history
from pdspec.engine.prefix import Prefixes
from pdspec.engine.resources import load
from pdspec.engine.sequence import DecodeSequence, first_chunk
from pdspec.engine.steptimes import measure_prompts
from pdspec.errors import PdspecError, TransferDamaged
from pdspec.parallel.ranks import RankProcess, StartRank
from pdspec.spec.protocol import HiddenRows
from pdspec.types import DraftPrefill, FinishReason, GenerateRequest

log = logging.getLogger(__name__)


class DecodeHost:
    """All methods but ``__init__`` run on the engine thread."""

    def __init__(self, config: WorkerConfig, start: StartRank = RankProcess) -> None:
        self.resources = load(config, start)
        self.prefill, self.decode = PrefillEngine(self.resources), DecodeEngine(self.resources)
        for tokens, seconds in measure_prompts(self.resources):
            self.prefill.times.add(tokens, seconds)
        self.prefixes = Prefixes(self.resources)
        self.prompts: list[Answer] = []
        self.parking = Parking(self.resources, config.retract_memory, self.prompts.append)
        pool = self.resources.pool
        if config.tp > 1 and config.kv_overcommit > 1:
            log.info("with %d ranks no answer is retracted: its pages are promised once (kv_overcommit 1)", config.tp)
        self.scheduler: DecodeScheduler[Answer] = DecodeScheduler(
            pool, config.max_batch, lambda answer, count: self.prefixes.take(answer.prefix, answer.ctx, count),
            overcommit=config.kv_overcommit, keeper=self.parking if config.tp == 1 else None,
            watermark=round(config.kv_watermark * pool.num_pages),
        )  # fmt: skip
        self.stepping = 0  # sequences of the step at hand; 0 once nobody can step

    def new_answer(self, request: GenerateRequest, loop: asyncio.AbstractEventLoop) -> Answer:
        """An answer that holds nothing yet; safe on any thread. Raises UnknownName."""
        ctx, config = new_context(self.resources, request, []), self.resources.config
        drafter = self.resources.drafter(request.drafter)
        scratch = self.decode.scratch_rows(drafter, ctx.tree)
        return Answer(
            request=request,
            ctx=ctx,
            drafter=drafter,
            rows=self.decode.rows_needed(request, drafter, ctx.tree),
            scratch=scratch,
            headroom=config.reserve_headroom,
            buffer=config.stream_buffer,
            page_size=self.resources.pool.page_size,
            loop=loop,
            queue=asyncio.Queue(),
            room=loop.create_future(),
            queued_at=time.perf_counter(),
            cost=self.parking.retraction_s,
            prefix=self.prefixes.begin(request, drafter),
        )

    def enter(self, answer: Answer, wake: Wake) -> bool:
        """Queue an answer. False, and ``wake`` is called later, while another one fetches KV that it needs, too. Raises
        PoolExhausted when it never fits."""
        lands = answer.request.sampling.max_tokens > 1
        if lands and not self.prefixes.enter(answer.prefix, answer.ctx, wake):
            return False
        self.scheduler.add(answer)
        return True

    def step(self) -> bool:
        """One chunk of a local prefill, then one decode step."""
        if self.prompts:
            self._prefill_step()
        stepping = self.scheduler.make_room()
        self.stepping = len(stepping)
        if not stepping:
            return bool(self.prompts)
        rows, seconds = self.decode.rows, self.decode.clocks["forward"]
        results = self.decode.step([answer.sequence for answer in stepping if answer.sequence is not None])
        seconds = self.decode.clocks["forward"] - seconds
        self.parking.costs = self.parking.costs.computed(self.decode.rows - rows, seconds)
        for answer, (sequence, result) in zip(stepping, results, strict=True):
            if sequence.finish is not None:
                self._let_go(answer)
            answer.deliver(result)
        return True

    def join(self, answer: Answer, handed: Handed) -> str:
        """The handoff is complete and checked: decode from the next step on. Where its drafter cannot go on from what
        came, nothing is joined and the reason returned; otherwise it is empty."""
        if answer not in self.scheduler.granted:
            return ""  # released meanwhile
        ctx, drafter, prefix = answer.ctx, answer.drafter, answer.prefix
        ctx.token_ids.append(handed.token_id)
        candidates, rows = handed.candidates, handed.rows
        if handed.draft_prefill is DraftPrefill.DECODE:
            behind = ctx.prompt_len - prefix.start
            tokens_alone = HiddenRows(start=prefix.start, captured=None, final=None, count=behind)
            parts = handed.hidden or [tokens_alone]
            for hidden in parts if prefix.hidden is None else [prefix.hidden, *parts]:
                prefix.boundaries.add(hidden)
                drafter.prefill(ctx, hidden)
            candidates, rows = drafter.start(ctx)
        try:
            drafter.resume(ctx, candidates, rows)
        except TransferDamaged as error:
            ctx.token_ids.pop()
            return str(error)
        self._run(answer)
        self.prefixes.keep(prefix, ctx, rows=ctx.prompt_len, made=drafter.rows_at(ctx.prompt_len))
        self.prefixes.claims.settle(prefix)
        return ""

    def prefill_here(self, answer: Answer) -> None:
        """Compute the prompt on this worker (colocated, by policy, or to rebuild draft state)."""
        if answer not in self.scheduler.granted:
            return
        answer.ctx.state = None  # of an attempt that failed
        answer.prompt = PrefillSequence(
            request=answer.request,
            ctx=answer.ctx,
            drafter=answer.drafter,
            draft_prefill=DraftPrefill.PREFILL,
            events=Kept(),
            ship_rows=False,
            num_computed=answer.prefix.start,
            prefix=answer.prefix,
            said=answer.first_sent if self.resources.config.lossy_wire else -1,
        )
        self.prompts.append(answer)

    def release(self, answer: Answer) -> None:
        """Forget an answer, whatever state it is in. Safe to repeat."""
        if answer in self.prompts:
            self.prompts.remove(answer)
        self._let_go(answer)

    def _let_go(self, answer: Answer) -> None:
        """Free an answer's pages; what is whole in them is kept for others."""
        sequence = answer.sequence
        if sequence is not None and sequence.finish is not FinishReason.ERROR and answer in self.scheduler.running:
            self.prefixes.keep_answer(answer.prefix, answer.ctx, answer.drafter)
        self.prefixes.claims.settle(answer.prefix)
        self.scheduler.release(answer)
        self.parking.forget(answer)

    def _prefill_step(self) -> None:
        answer = self.prompts[0]
        prompt = answer.prompt
        if prompt is None:
            raise PdspecError("a queued prompt has no sequence")
        try:
            self.prefill.step([(prompt, min(self.resources.config.chunk, prompt.remaining))])
        except PdspecError as error:
            self.release(answer)
            answer.deliver(error)
            return
        if not prompt.finished:
            return
        self.prompts.pop(0)
        kept = prompt.events
        assert isinstance(kept, Kept)
        if answer.sequence is not None:
            self._replayed(answer, answer.sequence, prompt)
            return
        self._run(answer)
        self.prefixes.keep(answer.prefix, answer.ctx, rows=prompt.num_computed, made=prompt.draft_rows)
        self.prefixes.claims.settle(answer.prefix)
        if self.send_first(answer, answer.ctx.token_ids[-1], kept):
            answer.drafter.resume(answer.ctx, *kept.begun)
        else:
            self.scheduler.release(answer)

    def _replayed(self, answer: Answer, sequence: DecodeSequence, prompt: PrefillSequence) -> None:
        """A retracted answer's rows are there again: go on from its root."""
        kept = prompt.events
        assert isinstance(kept, Kept)
        if prompt.ctx.token_ids[-1] != answer.ctx.token_ids[-1]:
            self.release(answer)
            answer.deliver(PdspecError("a replay chose another token", remedy="use numerics exact"))
            return
        answer.drafter.resume(prompt.ctx, *kept.begun)
        answer.ctx = sequence.ctx = prompt.ctx
        sequence.outlook.held = []
        self.scheduler.join(answer)

    def send_first(self, answer: Answer, token_id: int, kept: Kept) -> bool:
        """Deliver t_n unless the client has it. False when it ends the answer."""
        sequence = answer.sequence
        if sequence is None:
            raise PdspecError("no sequence to begin")
        chunk = first_chunk(sequence, kept.logprob, self.resources.end_ids)
        if answer.first_sent < 0:
            answer.first_sent = token_id
            answer.deliver(chunk)
        elif answer.first_sent != token_id:
            answer.deliver(PdspecError("a repeated prefill chose another first token", remedy="use numerics exact"))
            return False
        return sequence.finish is None

    def _run(self, answer: Answer) -> None:
        answer.sequence = DecodeSequence(
            request=answer.request,
            ctx=answer.ctx,
            drafter=answer.drafter,
            history=prompt_history(answer.request, self.resources.grammars).extended(answer.ctx.token_ids[-1:]),
            prefix=answer.prefix,
        )
        self.scheduler.join(answer)

    def figures(self) -> dict[str, float]:
        """What prompts and steps cost here, for Status; from any thread."""
        prompts = [answer.prompt.remaining for answer in list(self.prompts) if answer.prompt is not None]
        return {
            **self.prefill.figures(), "prefill_backlog_tokens": float(sum(prompts)),
            "step_seconds": self.decode.step_seconds.value,
        }  # fmt: skip

    def check_integrity(self) -> None:
        """See scheduler."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        """Stop the kernels' threads."""
        self.resources.close()
