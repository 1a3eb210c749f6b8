"""Medusa-1 (Cai et al., 2401.10774): residual blocks on the target's last hidden state, the target itself frozen.

Head k reads h_i after the final norm and predicts t_{i+2+k}; t_{i+1} is the target's own. Loss of head k: cross-entropy
against the target's distribution there, weighed 0.8^k (the paper's decay); the output rows are the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.spec.heads import TargetIdentity
from pdspec.spec.medusa.checkpoint import Heads, save_heads
from pdspec.spec.medusa.config import MedusaConfig
from pdspec.train.divergence import LOSSES
from pdspec.train.packing import Example, Packed
from pdspec.train.precision import product
from pdspec.train.scoring import StepScores, TargetParts, draft_ids_of, score, teacher, weighted

DECAY = 0.8


def new_tensors(config: MedusaConfig) -> dict[str, torch.Tensor]:
    """Starting weights under Medusa's keys: zero, so that every head begins as the target's own output."""
    return {name: torch.zeros(shape) for name, shape in config.shapes().items()}


class MedusaTrainer:
    """The heads as torch autograd sees them. ``parameters`` have Medusa's keys, float32."""

    def __init__(
        self, config: MedusaConfig, parameters: dict[str, torch.nn.Parameter], target_ids: torch.Tensor,
        parts: TargetParts,
    ) -> None:  # fmt: skip
        self.objective = LOSSES[0]
        self.config, self.parameters, self.target_ids, self.parts = config, parameters, target_ids, parts
        self.draft_ids = draft_ids_of(target_ids, config.vocab_size)

    def steps(self, examples: Sequence[Example], num_steps: int, *, rank: int = 0) -> list[StepScores]:
        """Scores of the first ``num_steps`` heads (at most all), see Trainer."""
        packed = Packed(examples)
        hidden, teacher_p = packed.own(examples), teacher(packed, self.parts)
        found = []
        for head in range(min(num_steps, self.config.num_heads)):
            rows = packed.query[packed.alive(head)]
            x, output = hidden[rows], self.parts.output
            for block in range(self.config.num_layers):
                name = f"{head}.{block}.linear"
                x = x + F.silu(product(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]))
            if self.config.own_lm_heads:
                output = self.parameters[f"{head}.{self.config.num_layers}.weight"]
            found.append(
                score(
                    x, output, packed, rows, head, teacher_p=teacher_p, draft_ids=self.draft_ids, rank=rank,
                    objective=self.objective,
                )
            )
        return found

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """Σ_k 0.8^k loss_k / Σ_k 0.8^k over all heads; ``num_steps`` is EAGLE's."""
        scores = self.steps(examples, self.config.num_heads)
        return weighted([one.loss for one in scores], DECAY), scores

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the heads, int8. Raises ConfigError when the folder cannot be written."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        heads = Heads(config=self.config, tensors=tensors, target_ids=self.target_ids, target=identity, card=dict(card))
        save_heads(folder, heads, int8=True)

    def about(self) -> str:
        """One sentence of its card on what it is made of."""
        config = self.config
        return (f"{config.num_heads} heads of {config.num_layers} residual blocks over the target's output rows of a"
                f" draft vocabulary of {config.draft_vocab_size}.")
