"""The decode step on one flat packed batch (DESIGN 7):

    propose → pack → forward → verify → commit → observe → emit

Every sequence brings its own rows and keeps its own accepted length. Rolling back is lowering a length: the rows of
rejected nodes are simply not part of the sequence any more (in debug mode all rows behind the last committed one are
filled with NaN after each step).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pdspec.engine.prefill import hidden_rows, hidden_wanted, page_table
from pdspec.engine.rates import Mean
from pdspec.engine.resources import Resources, tree_spec
from pdspec.engine.sequence import DecodeSequence
from pdspec.engine.speculation import make_budget
from pdspec.errors import PdspecError
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.sampling import stopping_ids
from pdspec.spec.protocol import Draft, DraftContext, Drafter, HiddenRows, Verdict
from pdspec.spec.tree import tree_rows
from pdspec.spec.verify import VerdictResult, verify
from pdspec.types import DraftTrace, FinishReason, GenerateRequest, TokenChunk

StepResult = tuple[DecodeSequence, TokenChunk | PdspecError]


class DecodeEngine:
    """Stateless but for the resources, what is known of budgets, and the clocks of its phases (seconds since start)."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.budget = make_budget(resources)
        self.steps = self.rows = 0  # since the start; rows of the target's forwards
        self.clocks: dict[str, float] = defaultdict(float)
        self.step_seconds = Mean()

    def rows_needed(self, request: GenerateRequest, drafter: Drafter, tree: str) -> int:
        """KV rows that a sequence may ever touch: prompt, answer, and the widest proposal or verification."""
        return len(request.prompt_ids) + request.sampling.max_tokens + self.scratch_rows(drafter, tree) - 1

    def scratch_rows(self, drafter: Drafter, tree: str) -> int:
        """KV rows behind the root's that the widest proposal or verification may touch, and two that are committed."""
        spec = tree_spec(tree)
        return max(drafter.max_nodes, spec.max_nodes if spec else 0) + 2

    def step(self, sequences: Sequence[DecodeSequence]) -> list[StepResult]:
        """One verification for each sequence. A sequence whose scores are damaged gets its error, the others go on."""
        began = time.perf_counter()
        drafts = self.propose(sequences)
        proposed = time.perf_counter()
        batch = self.pack(sequences, drafts)
        output = self.forward(batch, drafts)
        forwarded = time.perf_counter()
        self.rows += batch.num_rows
        self.budget.timed(batch.num_rows, sum(s.num_rows for s in sequences), forwarded - proposed)
        verdicts = self.verdicts(sequences, drafts, output.logits)
        results, observations = self._commit_all(sequences, drafts, verdicts, output)
        verified = time.perf_counter()
        for name, group in observations.items():
            self.budget.observe(name, group)
        if self.resources.config.poison:
            self._poison([sequence for sequence in sequences if sequence.finish is None])
        self._count(sequences, began, proposed, forwarded, verified)
        return results

    def propose(self, sequences: Sequence[DecodeSequence]) -> list[Draft]:
        """Drafts by family, trimmed to what the answer can still use and the budget allows."""
        return self.budget.propose(sequences)

    def pack(self, sequences: Sequence[DecodeSequence], drafts: Sequence[Draft]) -> ForwardBatch:
        """The target rows of all sequences: each its root, then its nodes."""
        parts = [tree_rows(d, s.num_rows, s.ctx.root_position) for s, d in zip(sequences, drafts, strict=True)]
        widest = max(part.ancestors.shape[1] for part in parts)
        padded = [np.pad(p.ancestors, ((0, 0), (0, widest - p.ancestors.shape[1])), constant_values=-1) for p in parts]
        tokens = [np.concatenate(([s.ctx.token_ids[-1]], d.rows[0])) for s, d in zip(sequences, drafts, strict=True)]
        count = [len(part.slots) for part in parts]
        starts = np.cumsum([0, *count[:-1]], dtype=np.int32)
        return ForwardBatch(
            token_ids=np.concatenate(tokens).astype(np.int32),
            positions=np.concatenate([p.positions for p in parts]),
            sequence=np.repeat(np.arange(len(parts), dtype=np.int32), count),
            slots=np.concatenate([p.slots for p in parts]),
            prefix_len=np.concatenate([p.prefix_len for p in parts]),
            ancestors=np.ascontiguousarray(np.concatenate(padded)),
            page_table=page_table([s.ctx.pages for s in sequences]),
            logit_rows=np.concatenate([first + _asked(d) for first, d in zip(starts, drafts, strict=True)]),
            **hidden_wanted([s.drafter for s in sequences]),
        )

    def forward(self, batch: ForwardBatch, drafts: Sequence[Draft]) -> ForwardOutput:
        """The target over ``batch``, which has the roots and nodes of ``drafts``."""
        return self.resources.runner.forward(batch, self.resources.cache)

    def verdicts(
        self, sequences: Sequence[DecodeSequence], drafts: Sequence[Draft], logits: torch.Tensor
    ) -> list[VerdictResult | PdspecError]:
        """What becomes of each draft, or why it cannot be said; ``logits`` [L, V] are those that ``pack`` asked for.
        Changes nothing: all are judged before any is committed."""
        results: list[VerdictResult | PdspecError] = []
        first = 0
        for sequence, draft in zip(sequences, drafts, strict=True):
            try:
                results.append(self.judge(sequence, draft, logits[first : first + 1 + draft.num_nodes]))
            except PdspecError as error:
                results.append(error)
            first += len(_asked(draft))
        return results

    def judge(self, sequence: DecodeSequence, draft: Draft, logits: torch.Tensor) -> VerdictResult:
        """``verify`` with what the engine knows; ``logits`` [1 + N, V]. Changes nothing."""
        params = sequence.request.sampling
        return verify(
            draft,
            logits,
            params,
            sequence.history,
            sequence.ctx.chooser,
            root_position=sequence.ctx.root_position,
            end_ids=self.resources.end_ids,
            max_new=sequence.remaining,
            logprobs=params.logprobs,
        )

    def _commit_all(
        self, sequences: Sequence[DecodeSequence], drafts: Sequence[Draft],
        verdicts: Sequence[VerdictResult | PdspecError], output: ForwardOutput,
    ) -> tuple[list[StepResult], dict[str, list[tuple[DraftContext, Verdict, HiddenRows]]]]:  # fmt: skip
        """The step's results, and by drafter what it is to observe."""
        results: list[StepResult] = []
        observations = defaultdict(list)
        row = logit = 0
        for sequence, draft, found in zip(sequences, drafts, verdicts, strict=True):
            first, told = row, slice(logit + 1 + draft.num_nodes, logit + len(_asked(draft)))
            row, logit = row + 1 + len(draft.rows[0]), told.stop
            if isinstance(found, PdspecError):
                sequence.finish = FinishReason.ERROR
                results.append((sequence, found))
                continue
            hidden = self._commit(sequence, draft, found.verdict, output, first)
            if sequence.prefix is not None:
                sequence.prefix.boundaries.add(hidden)
            if draft.branch is not None:
                hidden = replace(hidden, branch_ids=output.logits[told].argmax(-1).cpu().numpy())
            if sequence.finish is None:
                observations[sequence.drafter.name].append((sequence.ctx, found.verdict, hidden))
            results.append((sequence, self._chunk(sequence, draft, found)))
        return results, observations

    def _commit(
        self, sequence: DecodeSequence, draft: Draft, verdict: Verdict, output: ForwardOutput, first: int
    ) -> HiddenRows:
        """Append the outputs, make the accepted rows contiguous, and hand on the hidden states of the accepted path."""
        ctx, base = sequence.ctx, sequence.num_rows
        target = self.resources.runner.group.name
        source = [base + 1 + node for node in verdict.path]
        wanted = list(range(base + 1, base + 1 + len(source)))
        if source != wanted:
            self.resources.cache.copy_rows(target, ctx.pages, source, wanted)
        sequence.tally(draft, verdict.num_accepted)
        seen = [first, *(first + 1 + node for node in verdict.path)]
        ctx.token_ids.extend(verdict.output_ids)
        sequence.history = sequence.history.extended(verdict.output_ids)
        sequence.num_output += len(verdict.output_ids)
        if verdict.output_ids[-1] in stopping_ids(sequence.request.sampling, self.resources.end_ids):
            sequence.finish = FinishReason.STOP
        elif sequence.remaining <= 0:
            sequence.finish = FinishReason.LENGTH
        return hidden_rows(sequence.drafter, output, base, seen)

    def _poison(self, sequences: Sequence[DecodeSequence]) -> None:
        """NaN into every row behind the committed ones, in all cache groups: rejected nodes, scratch of the drafters,
        and whatever an earlier owner left. Pages that others may read are left alone."""
        cache = self.resources.cache
        for sequence in sequences:
            pages, committed = sequence.ctx.pages, {self.resources.runner.group.name: sequence.num_rows}
            committed.update(sequence.drafter.rows_at(sequence.ctx.root_position))
            shared = sequence.prefix.shared_rows(cache.page_size) if sequence.prefix is not None else 0
            for group in cache.groups:
                first = max(shared, committed.get(group.name, 0))
                cache.poison(group.name, pages, first, len(pages) * cache.page_size)

    def _chunk(self, sequence: DecodeSequence, draft: Draft, found: VerdictResult) -> TokenChunk:
        verdict, trace = found.verdict, None
        if sequence.request.trace:
            trace = DraftTrace(
                token_ids=tuple(draft.token_ids.tolist()),
                parents=tuple(draft.parents.tolist()),
                accepted=verdict.num_accepted,
            )
        return TokenChunk(
            request_id=sequence.request.request_id,
            start=sequence.num_output - len(verdict.output_ids),
            token_ids=verdict.output_ids,
            logprobs=found.logprobs,
            finish_reason=sequence.finish,
            trace=trace,
            stop_match=str(verdict.output_ids[-1]) if sequence.finish is FinishReason.STOP else "",
            stats=sequence.stats() if sequence.finish else None,
        )

    def _count(
        self, sequences: Sequence[DecodeSequence], began: float, proposed: float, forwarded: float, verified: float
    ) -> None:
        ended = time.perf_counter()
        self.steps += 1
        self.step_seconds.add(ended - began)
        for name, seconds in (
            ("draft", proposed - began + ended - verified),
            ("forward", forwarded - proposed),
            ("verify", verified - forwarded),
        ):
            self.clocks[name] += seconds
        for sequence in sequences:
            sequence.seconds += ended - began


def _asked(draft: Draft) -> np.ndarray:
    """Rows of one verification whose logits are wanted, int32: the root's, the nodes', those the branch asks about."""
    judged = np.arange(1 + draft.num_nodes, dtype=np.int32)
    return judged if draft.branch is None else np.concatenate((judged, draft.branch.asked + np.int32(len(judged))))
