"""EAGLE-3 with training-time test (Li et al., 2503.01840): the head is trained on its own outputs.

Row i reads the target's features h_i and token t_{i+1} and predicts t_{i+2}. In step j ≥ 1 the same row reads its
own output of step j-1 and t_{i+1+j}, stands at position i+j, and predicts t_{i+2+j}; it attends to the target-made
rows 0..i and to its own rows of steps 1..j, exactly as a chain drafted from row i does. Sequences are packed, not
padded: F rows in all, of which only those that predict answer tokens ask a query.

Loss of a row: cross-entropy of q against the target's distribution over the draft vocabulary; rows whose best target
token lies outside that vocabulary are masked; step j counts 0.8^j. One target forward serves all steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.spec.eagle3.checkpoint import Head, save_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.heads import TargetIdentity
from pdspec.train.chain import ChainTrainer
from pdspec.train.packing import Example, Packed
from pdspec.train.precision import product
from pdspec.train.scoring import StepScores, TargetParts, rms, teacher, weighted

DECAY = 0.8


def new_tensors(
    config: Eagle3Config, target: dict[str, torch.Tensor], target_ids: torch.Tensor, num_layers: int, seed: int
) -> dict[str, torch.Tensor]:
    """Starting weights under SafeAILab's keys. Features start as the last fused level; norms, attention over features
    and (where it fits) the MLP start as the target's last layer; lm_head as the target's output rows; the rest random.

    ``target`` has Hugging Face keys; its tensors are copied."""
    random = torch.Generator().manual_seed(seed)
    hidden = config.hidden_size
    tensors = {name: 0.02 * torch.randn(shape, generator=random) for name, shape in config.matrix_shapes().items()}
    tensors["fc.weight"][:, -hidden:] += torch.eye(hidden)
    last = f"model.layers.{num_layers - 1}."
    for letter in "qkv":
        tensors[f"midlayer.self_attn.{letter}_proj.weight"][:, hidden:] = target[
            f"{last}self_attn.{letter}_proj.weight"
        ].float()
    tensors["midlayer.self_attn.o_proj.weight"] = target[f"{last}self_attn.o_proj.weight"].float().clone()
    for name in ("gate_proj", "up_proj", "down_proj"):
        source = target[f"{last}mlp.{name}.weight"]
        if tuple(source.shape) == config.matrix_shapes()[f"midlayer.mlp.{name}.weight"]:
            tensors[f"midlayer.mlp.{name}.weight"] = source.float().clone()
    if not config.tied_output:
        output = target.get("lm_head.weight", target["model.embed_tokens.weight"])
        tensors["lm_head.weight"] = output[target_ids].float()
    tensors["midlayer.hidden_norm.weight"] = target[f"{last}input_layernorm.weight"].float().clone()
    tensors["midlayer.post_attention_layernorm.weight"] = (
        target[f"{last}post_attention_layernorm.weight"].float().clone()
    )
    tensors["norm.weight"] = target["model.norm.weight"].float().clone()
    tensors["midlayer.input_layernorm.weight"] = torch.ones(hidden)
    return tensors


@dataclass(frozen=True, kw_only=True)
class Variation:
    """How the training differs from the paper's, to be studied. ``feature_weight``: of EAGLE-1's smooth-L1 between the
    normed output and the target's own state at that place; ``self_drafted``: later steps read the head's own best
    token instead of the text's; ``last_level``: of the three levels only the last is read."""

    feature_weight: float = 0.0
    self_drafted: bool = False
    last_level: bool = False


class Eagle3Trainer(ChainTrainer):
    """The head as torch autograd sees it. ``parameters`` have SafeAILab's keys, float32."""

    def __init__(
        self, config: Eagle3Config, parameters: dict[str, torch.nn.Parameter], target_ids: torch.Tensor,
        parts: TargetParts, max_positions: int,
    ) -> None:  # fmt: skip
        super().__init__(config, parameters, target_ids, parts, "midlayer", max_positions)
        self.config, self.variation = config, Variation()

    def head(self, target: TargetIdentity | None = None, card: dict[str, Any] | None = None) -> Head:
        """The current weights as a head that can be saved."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        return Head(config=self.config, tensors=tensors, target_ids=self.target_ids, target=target, card=card or {})

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the head, int8. Raises ConfigError when the folder cannot be written."""
        save_head(folder, self.head(identity, dict(card)), int8=True)

    def about(self) -> str:
        """One sentence of its card on what it is made of."""
        layers = ", ".join(map(str, self.config.fused_layers))
        return f"draft vocabulary {self.config.draft_vocab_size}; reads the inputs of layers {layers}."

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """Σ_j 0.8^j loss_j / Σ_j 0.8^j, and the steps."""
        packed, scores, regressions = Packed(examples), [], []
        teacher_p = teacher(packed, self.parts)
        for one in self.chain(packed, self.features(packed, examples), num_steps):
            scores.append(self.judge(one, packed, teacher_p))
            if self.variation.feature_weight:
                wanted = packed.final[packed.final_row[one.rows] + one.step]
                regressions.append(F.smooth_l1_loss(self.scored(one.output)[0], wanted))
        loss = weighted([one.loss for one in scores], DECAY)
        if regressions:
            loss = loss + self.variation.feature_weight * weighted(regressions, DECAY)
        return loss, scores

    def features(self, packed: Packed, examples: Sequence[Example]) -> torch.Tensor:
        """Three levels, fused."""
        captured = packed.captured
        if self.variation.last_level:
            captured = captured.clone()
            captured[:, : -self.config.hidden_size] = 0.0
        return product(captured, self.parameters["fc.weight"])

    def next_ids(self, packed: Packed, rows: torch.Tensor, step: int, output: torch.Tensor) -> torch.Tensor:
        """The text's, or the best of the step before."""
        if not self.variation.self_drafted:
            return super().next_ids(packed, rows, step, output)
        with torch.no_grad():
            return self.target_ids[product(*self.scored(output)).argmax(-1)]

    def inputs(self, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The feature before its norm, and both norms side by side."""
        w, eps = self.parameters, self.config.rms_norm_eps
        embedded = rms(self.parts.embedding[ids], w["midlayer.input_layernorm.weight"], eps)
        return features, torch.cat((embedded, rms(features, w["midlayer.hidden_norm.weight"], eps)), 1)

    def scored(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Through its own norm and output rows (or the target's)."""
        w = self.parameters
        rows = self.parts.output if self.config.tied_output else w["lm_head.weight"]
        return rms(output, w["norm.weight"], self.config.rms_norm_eps), rows
