"""EAGLE-1 (Li et al., 2401.15077): the head learns the target's next feature, and through it the next token.

Row i reads h_i, the target's state after its final norm, with uniform noise of ±0.1 while it is trained, and t_{i+1}.
Loss: smooth-L1 between its output and h_{i+1}, and 0.1 times the cross-entropy of q against the target's distribution
(the paper's w_cls). The output rows are the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.spec.eagle1.checkpoint import Head, save_head
from pdspec.spec.eagle1.config import Eagle1Config
from pdspec.spec.heads import TargetIdentity
from pdspec.train.chain import ChainTrainer
from pdspec.train.packing import Example, Packed
from pdspec.train.precision import product
from pdspec.train.scoring import StepScores, TargetParts, teacher

TOKEN_WEIGHT = 0.1
NOISE = 0.1


def new_tensors(
    config: Eagle1Config, target: Mapping[str, torch.Tensor], num_layers: int, seed: int
) -> dict[str, torch.Tensor]:
    """Starting weights under SafeAILab's keys: the feature passes through ``fc``; norm, output projection and (where it
    fits) the MLP start as the target's last layer, the rest random. ``target`` has Hugging Face keys."""
    random = torch.Generator().manual_seed(seed)
    hidden, last = config.hidden_size, f"model.layers.{num_layers - 1}."
    tensors = {
        name: 0.02 * torch.randn(shape, generator=random) if len(shape) > 1 else torch.zeros(shape)
        for name, shape in config.shapes().items()
    }
    tensors["fc.weight"][:, hidden:] += torch.eye(hidden)
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"):
        source, key = target[f"{last}{name}.weight"], f"layers.0.{name}.weight"
        if tuple(source.shape) == config.shapes()[key]:
            tensors[key] = source.float().clone()
    return tensors


class Eagle1Trainer(ChainTrainer):
    """The head as torch autograd sees it. ``parameters`` have SafeAILab's keys, float32."""

    def __init__(
        self, config: Eagle1Config, parameters: dict[str, torch.nn.Parameter], target_ids: torch.Tensor,
        parts: TargetParts, max_positions: int,
    ) -> None:  # fmt: skip
        super().__init__(config, parameters, target_ids, parts, "layers.0", max_positions)
        self.config = config

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the head, int8. Raises ConfigError when the folder cannot be written."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        head = Head(config=self.config, tensors=tensors, target_ids=self.target_ids, target=identity, card=dict(card))
        save_head(folder, head, int8=True)

    def about(self) -> str:
        """One sentence of its card on what it is made of."""
        return f"the target's output rows of a draft vocabulary of {self.config.draft_vocab_size}."

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """Of the first step alone, as the paper trains it; ``num_steps`` is EAGLE-3's."""
        packed = Packed(examples)
        features = self.features(packed, examples)
        noisy = features + (torch.rand_like(features) - 0.5) * (2 * NOISE)
        (one,) = self.chain(packed, noisy, 1)
        scores = self.judge(one, packed, teacher(packed, self.parts))
        regression = F.smooth_l1_loss(one.output, packed.final[packed.final_row[one.rows]])
        return regression + TOKEN_WEIGHT * scores.loss, [scores]

    def features(self, packed: Packed, examples: Sequence[Example]) -> torch.Tensor:
        """The target's final states."""
        return packed.own(examples)

    def inputs(self, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and feature through ``fc``; there is no norm before attention."""
        both = torch.cat((self.parts.embedding[ids], features), 1)
        x = product(both, self.parameters["fc.weight"], self.parameters.get("fc.bias"))
        return x, x

    def scored(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's own output rows; there is no final norm."""
        return output, self.parts.output
