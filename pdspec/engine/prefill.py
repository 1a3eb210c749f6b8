"""The prefill step: chunks of several prompts through the target and, unless the decode worker does it, the drafter.

    pack → forward (KV leaves layer by layer) → first token → draft prefill → draft start → done

What becomes final is told to the sequence's ``PrefillEvents`` from the engine thread; whoever listens decides
whether it travels (the prefill worker) or stays (one process).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from pdspec.engine.prefix import Prefix
from pdspec.engine.rates import Line
from pdspec.engine.resources import Resources
from pdspec.errors import PdspecError
from pdspec.grammar import Grammars
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.sampling import History, pick, stopping_ids, support, token_logprob
from pdspec.spec.protocol import Candidates, DraftContext, Drafter, HiddenRows
from pdspec.types import DraftPrefill, GenerateRequest, TokenLogprob

_FURTHEST = 4.0  # a step that was held up counts as so many times too slow at most


class PrefillEvents(Protocol):
    """Told from the engine thread, in order; must not block. Rows stay in the pages until the sequence is released."""

    def rows(self, group: str, layer: int, start: int, stop: int) -> None:
        """KV rows of one layer of one group are final."""

    def hidden(self, rows: HiddenRows) -> None:
        """Target hidden rows for a drafter that is prefilled elsewhere."""

    def first(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """t_n."""

    def start(self, candidates: Candidates | None, rows: dict[str, torch.Tensor]) -> None:
        """The drafter's start."""

    def done(self) -> None:
        """Nothing more comes."""

    def failed(self, error: PdspecError) -> None:
        """This prompt ends with ``error``, and no other one does."""


@dataclass(kw_only=True, eq=False)
class PrefillSequence:
    """One prompt being computed. ``ctx.token_ids`` holds the prompt, and t_n once it is known."""

    request: GenerateRequest
    ctx: DraftContext
    drafter: Drafter
    draft_prefill: DraftPrefill
    events: PrefillEvents
    ship_rows: bool = True  # whether anyone wants the KV rows
    num_computed: int = 0
    prefix: Prefix | None = None  # what of it was there already
    hidden_from: int = 0  # hidden rows that are wanted elsewhere, where the drafter is prefilled elsewhere
    draft_rows: dict[str, int] = field(default_factory=dict)  # rows told per draft group
    said: int = -1  # t_n where a client has it already, and this prefill may read other KV than the one that chose it
    resumed: bool = False  # the rows of ``prefix`` were told
    abandoned: bool = False  # nobody waits for it any more; may be set from any thread
    finished: bool = False  # the first token ends the answer, or the prefill is complete
    started_at: float = 0.0
    seconds: float = 0.0

    @property
    def remaining(self) -> int:
        """Prompt tokens not yet computed."""
        return self.ctx.prompt_len - self.num_computed

    @property
    def wants_hidden(self) -> bool:
        """Whether the target's hidden states of this prompt are needed at all."""
        return self.request.sampling.max_tokens > 1


def prompt_history(request: GenerateRequest, grammars: Grammars) -> History:
    """Penalties and grammar see a replayed prompt's tail as output, as they did the first time."""
    split = len(request.prompt_ids) - request.replayed
    grammar = grammars.start(request.sampling)
    return History.of(request.prompt_ids[:split], request.prompt_ids[split:], grammar=grammar)


class _Abandoned(Exception):
    """Every prompt of the step was abandoned."""


class PrefillEngine:
    """Stateless but for the resources; sequences are the caller's."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.steps = 0  # grows with every layer: busy and stuck differ
        self.times = Line(_FURTHEST)  # of its steps, by prompt tokens

    def step(self, work: Sequence[tuple[PrefillSequence, int]]) -> None:
        """Compute the next ``count`` tokens of each prompt. Events tell what became final. A step whose prompts are
        all abandoned ends after the layer at hand: a chunk may take seconds, their pages are wanted sooner."""
        began = time.perf_counter()
        for sequence, _ in work:
            if sequence.prefix is not None and not sequence.resumed:
                self._resume(sequence, sequence.prefix)
        try:
            output = self.resources.runner.forward(
                self._pack(work), self.resources.cache, lambda layer: self._layer(work, layer)
            )
        except _Abandoned:
            return
        row = logit = 0
        for sequence, count in work:
            sequence.started_at = sequence.started_at or began
            rows = slice(row, row + count)
            last = count == sequence.remaining
            hidden = hidden_rows(sequence.drafter, output, sequence.num_computed, rows)
            sequence.num_computed += count
            if sequence.prefix is not None:
                sequence.prefix.boundaries.add(hidden)
            try:
                self._advance(sequence, hidden, output.logits[logit] if last else None)
            except PdspecError as error:  # damaged scores, or no token that is allowed: this prompt's alone
                sequence.finished = True
                sequence.events.failed(error)
            row, logit = row + count, logit + last
            sequence.seconds = time.perf_counter() - sequence.started_at
        self.times.add(row, time.perf_counter() - began)

    def figures(self) -> dict[str, float]:
        """What prompts cost, for Status; from any thread."""
        constant, each = self.times.fit
        return {
            "prefill_tokens_per_second": 1.0 / each if each > 0 else 0.0, "prefill_step_seconds": constant,
            "prefill_chunk": float(self.resources.config.chunk),
        }  # fmt: skip

    def _resume(self, sequence: PrefillSequence, prefix: Prefix) -> None:
        """Tell the rows that are there, and make the draft rows that read the tokens behind them."""
        sequence.resumed = True
        group = self.resources.runner.group
        if sequence.ship_rows and sequence.num_computed:
            for layer in range(group.num_layers):
                sequence.events.rows(group.name, layer, 0, sequence.num_computed)
        if prefix.hidden is not None:
            sequence.drafter.prefill(sequence.ctx, prefix.hidden)
            self._draft_rows(sequence)

    def _pack(self, work: Sequence[tuple[PrefillSequence, int]]) -> ForwardBatch:
        tokens, slots, owner, logit_rows, row = [], [], [], [], 0
        for index, (sequence, count) in enumerate(work):
            start = sequence.num_computed
            tokens.append(np.array(sequence.ctx.token_ids[start : start + count], np.int32))
            slots.append(np.arange(start, start + count, dtype=np.int32))
            owner.append(np.full(count, index, np.int32))
            row += count
            if count == sequence.remaining:
                logit_rows.append(row - 1)
        slot_R = np.concatenate(slots)
        return ForwardBatch(
            token_ids=np.concatenate(tokens),
            positions=slot_R,
            sequence=np.concatenate(owner),
            slots=slot_R,
            prefix_len=slot_R + 1,
            ancestors=np.empty((row, 0), np.int32),
            page_table=page_table([s.ctx.pages for s, _ in work]),
            logit_rows=np.array(logit_rows, np.int32),
            **hidden_wanted([s.drafter for s, _ in work if s.wants_hidden]),
        )

    def _layer(self, work: Sequence[tuple[PrefillSequence, int]], layer: int) -> None:
        self.steps += 1
        if all(sequence.abandoned for sequence, _ in work):
            raise _Abandoned
        group = self.resources.runner.group.name
        for sequence, count in work:
            if sequence.ship_rows:
                sequence.events.rows(group, layer, sequence.num_computed, sequence.num_computed + count)

    def _advance(self, sequence: PrefillSequence, hidden: HiddenRows, logits: torch.Tensor | None) -> None:
        if logits is not None:
            self._first(sequence, logits)
        if sequence.finished or not sequence.wants_hidden:
            return
        if sequence.draft_prefill is DraftPrefill.DECODE:
            known = max(0, sequence.hidden_from - hidden.start)
            if (sequence.drafter.capture or sequence.drafter.want_final) and known < hidden.num_rows:
                sequence.events.hidden(hidden.after(known))
        else:
            sequence.drafter.prefill(sequence.ctx, hidden)
            self._draft_rows(sequence)
            if logits is not None:
                sequence.events.start(*sequence.drafter.start(sequence.ctx))
        if logits is not None:
            self._finish(sequence)

    def _first(self, sequence: PrefillSequence, logits: torch.Tensor) -> None:
        request, params, ctx = sequence.request, sequence.request.sampling, sequence.ctx
        history = prompt_history(request, self.resources.grammars)
        allowed = support(logits, params, history, end_ids=self.resources.end_ids)
        if sequence.said < 0:
            token = pick(allowed, params, lambda ids: ctx.chooser.noise(ctx.prompt_len, ids))
        else:
            token = sequence.said
        logprob = None if params.logprobs is None else token_logprob(allowed, token, params.logprobs)
        ctx.token_ids.append(token)
        sequence.events.first(token, logprob)
        if token in stopping_ids(params, self.resources.end_ids) or params.max_tokens <= 1:
            self._finish(sequence)

    def _draft_rows(self, sequence: PrefillSequence) -> None:
        """Tell the draft rows that have become final."""
        final = sequence.drafter.rows_at(sequence.num_computed)
        for group in sequence.drafter.groups:
            start, stop = sequence.draft_rows.get(group.name, 0), final[group.name]
            if sequence.ship_rows and stop > start:
                for layer in range(group.num_layers):
                    sequence.events.rows(group.name, layer, start, stop)
            sequence.draft_rows[group.name] = stop

    def _finish(self, sequence: PrefillSequence) -> None:
        sequence.finished = True
        sequence.seconds = time.perf_counter() - sequence.started_at
        sequence.events.done()


def page_table(pages: Sequence[Sequence[int]]) -> np.ndarray:
    """[S, P] int32, padded with -1."""
    table = np.full((len(pages), max((len(p) for p in pages), default=0)), -1, np.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    return table


def hidden_wanted(drafters: Sequence[Drafter]) -> dict:
    """``capture`` and ``want_final`` of a batch that serves these drafters. Raises ValueError for drafters that
    capture different layers: they cannot share a forward."""
    captures = {drafter.capture for drafter in drafters if drafter.capture}
    if len(captures) > 1:
        raise ValueError(f"one forward cannot capture {captures}")
    return {"capture": next(iter(captures), ()), "want_final": any(drafter.want_final for drafter in drafters)}


def hidden_rows(drafter: Drafter, output: ForwardOutput, start: int, rows: slice | list[int]) -> HiddenRows:
    """What ``drafter`` asks for of these rows of a forward, which may have served drafters that ask for more."""
    return HiddenRows(
        start=start,
        captured=output.captured[rows] if output.captured is not None and drafter.capture else None,
        final=output.final[rows] if output.final is not None and drafter.want_final else None,
        count=rows.stop - rows.start if isinstance(rows, slice) else len(rows),
    )
