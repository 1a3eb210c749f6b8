"""A small decoder distilled from the target (Leviathan et al., 2211.17192, section 2; DistillSpec, 2310.08461).

It reads the tokens alone: row i reads t_i and predicts t_{i+1}. Loss: how far its distribution is from the target's, on
answers that the target wrote. It is as wide as the target, whose embedding and output rows it borrows and leaves as
they are; its layers start as the target's first ones and its last, with those channels of their MLP that weigh most.

What a chain drafts at its j-th position, given that all before it were right, is what row i+j says: the steps of a
``Trainer`` are one forward, read j rows further on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.errors import ConfigError
from pdspec.model.config import ModelConfig, layer_shapes
from pdspec.spec.draft_model.trained import NAME, save_trained
from pdspec.spec.geometry import LayerGeometry, target_geometry
from pdspec.spec.headfile import StoredHead
from pdspec.spec.heads import TargetIdentity
from pdspec.train.divergence import LOSSES
from pdspec.train.layer import PackedLayer
from pdspec.train.packing import Example, Packed
from pdspec.train.scoring import StepScores, TargetParts, draft_ids_of, rms, score, teacher

_BY_CHANNEL = ("gate_proj", "up_proj")  # a channel is a row of these, a column of down_proj


def geometry_of(target: ModelConfig, num_layers: int, intermediate_size: int) -> ModelConfig:
    """Of a draft model with that many of ``target``'s layers; 0 channels: the target's. Raises ConfigError for sizes
    that the target has not."""
    channels = intermediate_size or target.intermediate_size
    for field, value, most in (("layers", num_layers, target.num_layers),
                               ("intermediate", channels, target.intermediate_size)):  # fmt: skip
        if not 1 <= value <= most:
            raise ConfigError(f"no draft model has {value} of the target's {most}", field=field,
                              remedy=f"choose 1 to {most}")
    return replace(target, name=NAME, num_layers=num_layers, intermediate_size=channels)


def new_tensors(config: ModelConfig, target: ModelConfig, weights: Mapping[str, torch.Tensor]) -> dict[
    str, torch.Tensor
]:
    """Starting weights under Hugging Face keys: the first layers of the target with ``weights``, and its last."""
    sources = [*range(config.num_layers - 1), target.num_layers - 1]
    tensors = {"model.norm.weight": weights["model.norm.weight"]}
    for layer, source in enumerate(sources):
        theirs = {name: weights[f"model.layers.{source}.{name}"] for name in layer_shapes(target, source)}
        down = theirs["mlp.down_proj.weight"]
        size = down.norm(dim=0)
        for name in _BY_CHANNEL:
            size = size * theirs[f"mlp.{name}.weight"].norm(dim=1)
        kept = size.topk(config.intermediate_size).indices.sort().values
        theirs["mlp.down_proj.weight"] = down[:, kept]
        theirs |= {f"mlp.{name}.weight": theirs[f"mlp.{name}.weight"][kept] for name in _BY_CHANNEL}
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in theirs.items()}
    return tensors


class DraftModelTrainer:
    """The model as torch autograd sees it. ``parameters`` have Hugging Face keys, float32; ``parts`` are the target's.
    """

    def __init__(
        self, config: ModelConfig, parameters: dict[str, torch.nn.Parameter], target_ids: torch.Tensor,
        parts: TargetParts, max_positions: int,
    ) -> None:  # fmt: skip
        self.objective = LOSSES[0]
        self.config, self.parameters, self.parts = config, parameters, parts
        self.target_ids = target_ids
        self.draft_ids = draft_ids_of(target_ids, config.vocab_size)
        geometry = LayerGeometry(**target_geometry(config, config.vocab_size))
        self.layers = [
            PackedLayer(geometry, parameters, f"model.layers.{layer}", max_positions)
            for layer in range(config.num_layers)
        ]

    def hidden(self, examples: Sequence[Example]) -> torch.Tensor:
        """[F, width] after the final norm: of the rows of ``Packed``, each at the token that its step 0 reads last."""
        eps, bounds = self.config.rms_norm_eps, [0]
        for example in examples:
            bounds.append(bounds[-1] + len(example.tokens) - 1)  # t_0 .. t_{N-2}
        positions = torch.cat([torch.arange(len(example.tokens) - 1) for example in examples])
        x = F.embedding(torch.cat([example.tokens[:-1] for example in examples]), self.parts.embedding)
        for layer in self.layers:
            x = layer.whole(rms(x, layer.weight("input_layernorm"), eps), x, positions, bounds)
        return rms(x, self.parameters["model.norm.weight"], eps)[positions > 0]

    def steps(self, examples: Sequence[Example], num_steps: int, *, rank: int = 0) -> list[StepScores]:
        """Scores of a chain's first ``num_steps`` positions, see Trainer."""
        packed, hidden = Packed(examples), self.hidden(examples)
        teacher_p = teacher(packed, self.parts)
        scores = []
        for step in range(num_steps):
            rows = packed.query[packed.alive(step)]
            scores.append(score(
                hidden[rows + step], self.parts.output, packed, rows, step, teacher_p=teacher_p,
                draft_ids=self.draft_ids, rank=rank, objective=self.objective,
            ))  # fmt: skip
        return scores

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """Of the next token alone; ``num_steps`` is EAGLE-3's."""
        (one,) = self.steps(examples, 1)
        return one.loss, [one]

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the model, int8. Raises ConfigError when the folder cannot be written."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        save_trained(folder, StoredHead(config=self.config, tensors=tensors, target_ids=self.target_ids,
                                        target=identity, card=dict(card)))

    def about(self) -> str:
        """One sentence of its card on what it is made of."""
        config = self.config
        return (f"a decoder of {config.num_layers} layers, {config.hidden_size} wide with {config.intermediate_size}"
                f" MLP channels, over the target's embedding and its output rows of {len(self.target_ids)} draft ids.")
