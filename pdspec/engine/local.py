"""One process, no handoff: the reference that every other path must equal, and ``pdspec generate --local``."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Sequence

import torch

from pdspec.cache.pool import pages_for
from pdspec.config import WorkerConfig
from pdspec.engine.decode import DecodeEngine
from pdspec.engine.prefill import PrefillEngine, PrefillSequence, prompt_history
from pdspec.engine.resources import Resources, load
from pdspec.engine.sequence import DecodeSequence, first_chunk
from pdspec.errors import PdspecError
from pdspec.spec.protocol import Candidates, DraftContext, HiddenRows
from pdspec.types import DraftPrefill, GenerateRequest, TokenChunk, TokenLogprob
from pdspec.validation import check_request


class Kept:
    """Prefill events of a sequence that stays: all that is needed later is t_n's logprob and the drafter's start."""

    def __init__(self) -> None:
        self.logprob: TokenLogprob | None = None
        self.begun: tuple[Candidates | None, dict[str, torch.Tensor]] = (None, {})

    def rows(self, group: str, layer: int, start: int, stop: int) -> None:
        """They are where they belong."""

    def hidden(self, rows: HiddenRows) -> None:
        """Never asked for: the drafter is prefilled here."""
        raise PdspecError("hidden rows without a taker")

    def first(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Keep the log probability; the token itself is in the context."""
        self.logprob = logprob

    def start(self, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """Keep what DraftStart would carry."""
        self.begun = candidates, rows

    def done(self) -> None:
        """Nothing is owed to anyone."""

    def failed(self, error: PdspecError) -> None:
        """Whoever made the step hears of it."""
        raise error


def new_context(resources: Resources, request: GenerateRequest, pages: list[int]) -> DraftContext:
    """The drafter's view of a request. The seed must be set. Raises UnknownName for its drafter."""
    if request.sampling.seed is None:
        raise PdspecError("a request without a seed reached an engine", field="seed")
    drafter = resources.drafter(request.drafter)
    return DraftContext(
        request_id=request.request_id,
        sampling=request.sampling,
        noise_key=(request.sampling.seed, request.sample),
        token_ids=list(request.prompt_ids),
        pages=pages,
        prompt_len=len(request.prompt_ids),
        tree=resources.tree(drafter, request.tree),
    )


def check(resources: Resources, request: GenerateRequest) -> None:
    """Raises InvalidRequest or UnknownName for a request that this process can never serve."""
    config = resources.files.config
    check_request(
        request,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
        drafters=tuple(resources.drafters),
        models=(resources.config.model,),
    )
    drafter = resources.drafter(request.drafter)
    if tree := resources.tree(drafter, request.tree):
        drafter.depth(tree)
    if request.sampling.structured:
        resources.grammars.check(request.sampling, request.prompt_ids[len(request.prompt_ids) - request.replayed :])


async def checked(resources: Resources, request: GenerateRequest) -> None:
    """``check`` within an event loop: a grammar may take a while to compile, which others need not wait for."""
    if request.sampling.structured:
        await asyncio.to_thread(check, resources, request)
    else:
        check(resources, request)


class LocalGenerator:
    """Prefill and decode in this process, one request or one batch at a time."""

    def __init__(self, config: WorkerConfig | None = None, *, resources: Resources | None = None) -> None:
        self.resources = resources or load(config or WorkerConfig())
        self.prefill, self.decode = PrefillEngine(self.resources), DecodeEngine(self.resources)

    def generate(self, request: GenerateRequest) -> Iterator[TokenChunk]:
        """The answer, chunk by chunk; pages are given back however the iteration ends. Raises PdspecError."""
        for _, chunk in self.generate_batch([request]):
            yield chunk

    def generate_batch(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, TokenChunk]]:
        """(index, chunk) of requests that decode together, each prefilled on its own first."""
        held: list[list[int]] = []
        running: dict[int, DecodeSequence] = {}
        try:
            for index, request in enumerate(requests):
                sequence, chunk = self.begin(request, held)
                if sequence.finish is None:
                    running[index] = sequence
                yield index, chunk
            while running:
                for sequence, result in self.decode.step(list(running.values())):
                    if isinstance(result, PdspecError):
                        raise result
                    index = next(i for i, s in running.items() if s is sequence)
                    if sequence.finish:
                        del running[index]
                    yield index, result
        finally:
            for pages in held:
                self.resources.pool.release(pages)

    def begin(self, request: GenerateRequest, held: list[list[int]]) -> tuple[DecodeSequence, TokenChunk]:
        """A prompt, prefilled, and its first chunk; its pages are added to ``held``, for the caller to release."""
        began = time.perf_counter()
        check(self.resources, request)
        drafter = self.resources.drafter(request.drafter)
        ctx = new_context(self.resources, request, [])
        rows = self.decode.rows_needed(request, drafter, ctx.tree)
        ctx.pages = self.resources.pool.allocate(pages_for(rows, self.resources.pool.page_size))
        held.append(ctx.pages)
        events = Kept()
        prompt = PrefillSequence(
            request=request,
            ctx=ctx,
            drafter=drafter,
            draft_prefill=DraftPrefill.PREFILL,
            events=events,
            ship_rows=False,
        )
        while not prompt.finished:
            self.prefill.step([(prompt, min(self.resources.config.chunk, prompt.remaining))])
        sequence = DecodeSequence(
            request=request, ctx=ctx, drafter=drafter,
            history=prompt_history(request, self.resources.grammars).extended(ctx.token_ids[-1:]),
        )  # fmt: skip
        chunk = first_chunk(sequence, events.logprob, self.resources.end_ids)
        if sequence.finish is None:
            drafter.resume(ctx, *events.begun)
        if chunk.stats:
            chunk = dataclasses.replace(
                chunk, stats=dataclasses.replace(chunk.stats, prefill_ms=1e3 * (time.perf_counter() - began))
            )
        return sequence, chunk
