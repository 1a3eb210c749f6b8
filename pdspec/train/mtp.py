"""MTP modules (DeepSeek-V3 report, 2.2): in series, teacher-forced, the target itself frozen.

Module m reads row i of the module before (h^0: the target's state after its final norm) and t_{i+m}, and predicts
t_{i+m+1}. Loss: the mean over modules of the cross-entropy of q against the target's distribution there. The output
rows are the target's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pdspec.spec.heads import TargetIdentity
from pdspec.spec.mtp.checkpoint import Head, save_head
from pdspec.spec.mtp.config import MtpConfig
from pdspec.train.divergence import LOSSES
from pdspec.train.layer import PackedLayer
from pdspec.train.packing import Example, Packed
from pdspec.train.precision import product
from pdspec.train.scoring import StepScores, TargetParts, draft_ids_of, rms, score, teacher, weighted


def new_tensors(
    config: MtpConfig, target: Mapping[str, torch.Tensor], num_layers: int, seed: int
) -> dict[str, torch.Tensor]:
    """Starting weights under DeepSeek's keys: h passes through ``eh_proj``, every layer starts as the target's last one
    (what fits of it), ``shared_head.norm`` as the target's final norm. ``target`` has Hugging Face keys."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module in range(1, config.num_modules + 1):
        prefix, shapes = config.prefix(module), config.module_shapes(module)
        for name, shape in shapes.items():
            source = target.get(name.replace(prefix, f"model.layers.{num_layers - 1}"))
            if source is not None and tuple(source.shape) == shape:
                tensors[name] = source.float().clone()
            else:
                tensors[name] = 0.02 * torch.randn(shape, generator=random) if len(shape) > 1 else torch.ones(shape)
        tensors[f"{prefix}.eh_proj.weight"][:, config.hidden_size :] += torch.eye(config.hidden_size)
        tensors[f"{prefix}.shared_head.norm.weight"] = target["model.norm.weight"].float().clone()
    return tensors


class MtpTrainer:
    """All modules as torch autograd sees them. ``parameters`` have DeepSeek's keys, float32."""

    def __init__(
        self, config: MtpConfig, parameters: dict[str, torch.nn.Parameter], target_ids: torch.Tensor,
        parts: TargetParts, max_positions: int,
    ) -> None:  # fmt: skip
        self.objective = LOSSES[0]
        self.config, self.parameters, self.target_ids, self.parts = config, parameters, target_ids, parts
        self.draft_ids = draft_ids_of(target_ids, config.vocab_size)
        self.layers = [
            PackedLayer(config, parameters, config.prefix(module), max_positions)
            for module in range(1, config.num_modules + 1)
        ]

    def steps(self, examples: Sequence[Example], num_steps: int, *, rank: int = 0) -> list[StepScores]:
        """Scores of the first ``num_steps`` modules (at most all), see Trainer."""
        packed, eps = Packed(examples), self.config.rms_norm_eps
        hidden, teacher_p, found = packed.own(examples), teacher(packed, self.parts), []
        every = torch.arange(len(packed.positions))
        for step, layer in enumerate(self.layers[:num_steps]):
            # the last rows of a sequence have no such token; nobody before them sees what they read instead
            embedded = rms(self.parts.embedding[packed.ids_after(every, step)], layer.weight("enorm"), eps)
            both = torch.cat((embedded, rms(hidden, layer.weight("hnorm"), eps)), 1)
            x = product(both, layer.weight("eh_proj"))
            output = layer.whole(rms(x, layer.weight("input_layernorm"), eps), x, packed.positions, packed.bounds)
            hidden = rms(output, layer.weight("shared_head.norm"), eps)
            rows = packed.query[packed.alive(step)]
            found.append(score(
                hidden[rows], self.parts.output, packed, rows, step, teacher_p=teacher_p, draft_ids=self.draft_ids,
                rank=rank, objective=self.objective,
            ))  # fmt: skip
        return found

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """Mean over all modules; ``num_steps`` is EAGLE-3's."""
        scores = self.steps(examples, len(self.layers))
        return weighted([one.loss for one in scores], 1.0), scores

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the modules, int8. Raises ConfigError when the folder cannot be written."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        head = Head(config=self.config, tensors=tensors, target_ids=self.target_ids, target=identity, card=dict(card))
        save_head(folder, head, int8=True)

    def about(self) -> str:
        """One sentence of its card on what it is made of."""
        return (f"{self.config.num_modules} modules in series over the target's output rows of a draft vocabulary of"
                f" {self.config.draft_vocab_size}.")
