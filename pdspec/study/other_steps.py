"""Engines that step as the production one does not: what its step is compared with. Both write the same tokens.

``PathByPath``    a tree's paths are verified one by one, one forward of the target for each (before tree attention)
``Synchronised``  a batch advances by its minimum: every sequence keeps as many tokens as the one that accepted least
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pdspec.engine.decode import DecodeEngine
from pdspec.engine.resources import Resources
from pdspec.engine.sequence import DecodeSequence
from pdspec.errors import PdspecError
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.spec.feature_rows import take_rows
from pdspec.spec.protocol import Draft, Verdict
from pdspec.spec.tree import ancestor_lists
from pdspec.spec.verify import VerdictResult
from pdspec.study.machine import weight_bytes


class Counting(DecodeEngine):
    """The production engine, counting the target's forwards and the bytes that each has to read at least: the weights
    once, and once the KV rows of each of its sequences."""

    in_step = False  # whether all sequences of a batch advance alike

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources)
        self.forwards = self.bytes_read = self.discarded = 0
        group = resources.runner.group
        self._row_bytes = group.row_bytes * group.num_layers
        self._weights = weight_bytes(resources.files.config, resources.config.dtype)

    def forward(self, batch: ForwardBatch, drafts: Sequence[Draft]) -> ForwardOutput:
        """As the real one, counted."""
        nodes, rows = np.any(batch.ancestors >= 0, axis=1), 0
        for one in np.unique(batch.sequence):
            own = batch.sequence == one
            rows += int(batch.prefix_len[own].max()) + int(np.count_nonzero(nodes & own))
        self.forwards += 1
        self.bytes_read += self._weights + rows * self._row_bytes
        return super().forward(batch, drafts)


class PathByPath(Counting):
    """Drafts without branches. A row stands where it stands in the tree, whichever path it comes with: what is
    accepted is committed from there."""

    def forward(self, batch: ForwardBatch, drafts: Sequence[Draft]) -> ForwardOutput:
        """One forward for the first path of every sequence, one for the second, until none has another."""
        starts = np.cumsum([0, *(1 + draft.num_nodes for draft in drafts)])
        rows = [
            [start + np.array([0, *(1 + node for node in path)], np.int32) for path in leaf_paths(draft)]
            for start, draft in zip(starts[:-1], drafts, strict=True)
        ]
        whole: ForwardOutput | None = None
        for turn in range(max(map(len, rows))):
            taken = np.concatenate([paths[turn] for paths in rows if turn < len(paths)])
            alone = replace(take_rows(batch, taken), logit_rows=np.arange(len(taken), dtype=np.int32))
            part = super().forward(alone, drafts)
            whole = whole or _room(part, batch.num_rows)
            where = torch.from_numpy(taken).long()
            for name in ("logits", "captured", "final"):
                if (values := getattr(part, name)) is not None:
                    getattr(whole, name)[where.to(values.device)] = values
        assert whole is not None
        return whole


class Synchronised(Counting):
    """``discarded`` counts the tokens that were judged right and are drafted again."""

    in_step = True

    def verdicts(
        self, sequences: Sequence[DecodeSequence], drafts: Sequence[Draft], logits: torch.Tensor
    ) -> list[VerdictResult | PdspecError]:
        """As the real one, each cut to the shortest."""
        found = super().verdicts(sequences, drafts, logits)
        least = min((len(one.verdict.output_ids) for one in found if isinstance(one, VerdictResult)), default=0)
        return [one if isinstance(one, PdspecError) else self._cut(one, least) for one in found]

    def _cut(self, found: VerdictResult, count: int) -> VerdictResult:
        path, output = found.verdict.path, found.verdict.output_ids
        self.discarded += len(output) - count
        return VerdictResult(
            verdict=Verdict(path=path[: count - 1], output_ids=output[:count]), logprobs=found.logprobs[:count]
        )


def leaf_paths(draft: Draft) -> list[list[int]]:
    """The nodes of each way from the root to a leaf, root side first; of an empty draft the empty one."""
    inner = set(draft.parents.tolist())
    lists = ancestor_lists(draft.parents)
    return [[n for n in lists[leaf].tolist() if n >= 0] for leaf in range(draft.num_nodes) if leaf not in inner] or [[]]


def _room(part: ForwardOutput, rows: int) -> ForwardOutput:
    """For the output of ``rows`` rows, NaN as yet: every row is on some path."""

    def empty(values: torch.Tensor) -> torch.Tensor:
        return values.new_full((rows, *values.shape[1:]), torch.nan)

    return ForwardOutput(
        logits=empty(part.logits), captured=None if part.captured is None else empty(part.captured),
        final=None if part.final is None else empty(part.final),
    )
