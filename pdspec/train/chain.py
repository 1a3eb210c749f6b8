"""Chains of a feature drafter under training (EAGLE-1, EAGLE-3): the head runs on its own outputs.

Row i reads the target's features h_i and token t_{i+1} and predicts t_{i+2}. In step j ≥ 1 the same row reads its own
output of step j-1 and t_{i+1+j}, and predicts t_{i+2+j}. Only rows that predict answer tokens ask a query. One target
forward serves all steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pdspec.spec.geometry import LayerGeometry
from pdspec.train.divergence import LOSSES
from pdspec.train.layer import PackedLayer
from pdspec.train.packing import Example, Keys, Packed, alive_in
from pdspec.train.scoring import StepScores, TargetParts, draft_ids_of, score, teacher


@dataclass(frozen=True)
class ChainStep:
    """Rows of one step: flat ``rows`` [M] and what the layer put out for them [M, H]."""

    step: int
    rows: torch.Tensor
    output: torch.Tensor


class ChainTrainer:
    """``parameters`` are the head's, float32. A family says what the layer reads (``inputs``) and how an output becomes
    logits (``scored``)."""

    def __init__(
        self, geometry: LayerGeometry, parameters: dict[str, torch.nn.Parameter], target_ids: torch.Tensor,
        parts: TargetParts, prefix: str, max_positions: int,
    ) -> None:  # fmt: skip
        self.objective = LOSSES[0]
        self.geometry, self.parameters, self.target_ids, self.parts = geometry, parameters, target_ids, parts
        self.layer = PackedLayer(geometry, parameters, prefix, max_positions)
        self.draft_ids = draft_ids_of(target_ids, geometry.vocab_size)

    def features(self, packed: Packed, examples: Sequence[Example]) -> torch.Tensor:
        """[F, H] of the target."""
        raise NotImplementedError

    def inputs(self, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual [R, H], what attention reads [R, *]) of tokens and features."""
        raise NotImplementedError

    def scored(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(y [M, H], output rows [draft vocabulary, H]): logits are their product."""
        raise NotImplementedError

    def next_ids(self, packed: Packed, rows: torch.Tensor, step: int, output: torch.Tensor) -> torch.Tensor:
        """The tokens that ``rows`` read in ``step``, after ``output`` of the step before: what the text has there."""
        return packed.ids_after(rows, step)

    def carried(self, output: torch.Tensor) -> torch.Tensor:
        """What rows read as their features in place of the target's: ``output`` [M, H] of the step before."""
        return output

    def chain(self, packed: Packed, features: torch.Tensor, num_steps: int) -> Iterator[ChainStep]:
        """The steps, one after the other."""
        residual, read = self.inputs(packed.next_ids, features)
        q, k, v = self.layer.qkv(read, packed.positions)
        keys, alive = Keys(k, v), torch.arange(len(packed.query))  # queries that take part in this step
        residual, q = residual[packed.query], q[packed.query]
        x = residual[:0]
        for step in range(num_steps):
            rows = packed.query[alive]
            if step:
                before, alive = alive, packed.alive(step)
                rows = packed.query[alive]
                x = x[alive_in(before, alive)]
                residual, read = self.inputs(self.next_ids(packed, rows, step, x), self.carried(x))
                q, k, v = self.layer.qkv(read, packed.positions[rows] + step)
                keys.extend(k, v, alive, len(packed.query))
            hidden = residual + self.layer.attended(q, keys, packed, alive)
            x = hidden + self.layer.mlp(hidden)
            yield ChainStep(step, rows, x)

    def steps(self, examples: Sequence[Example], num_steps: int, *, rank: int = 0) -> list[StepScores]:
        """All steps over a packed batch. ``rank``: how many best draft ids to return per row."""
        packed = Packed(examples)
        teacher_p = teacher(packed, self.parts)
        return [
            self.judge(one, packed, teacher_p, rank)
            for one in self.chain(packed, self.features(packed, examples), num_steps)
        ]

    def judge(self, one: ChainStep, packed: Packed, teacher_p: torch.Tensor, rank: int = 0) -> StepScores:
        """Scores of one step."""
        y, output = self.scored(one.output)
        return score(
            y, output, packed, one.rows, one.step, teacher_p=teacher_p, draft_ids=self.draft_ids, rank=rank,
            objective=self.objective,
        )
