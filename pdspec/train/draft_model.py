"""A small decoder distilled from the target (Leviathan et al., 2211.17192, section 2; DistillSpec, 2310.08461).

It reads the tokens alone: row i reads t_i and predicts t_{i+1} over the whole vocabulary. Loss: how far its
distribution is from the target's, on answers that the target wrote. Embedding and output rows are one matrix, which
starts as the target's embedding in its own leading directions; the layers start random.

What a chain drafts at its j-th position, given that all before it were right, is what row i+j says: the steps of a
``Trainer`` are one forward, read j rows further on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pdspec.model.config import ModelConfig, weight_shapes
from pdspec.spec.draft_model.trained import save_trained
from pdspec.spec.geometry import LayerGeometry, target_geometry
from pdspec.spec.heads import TargetIdentity
from pdspec.train.divergence import LOSSES
from pdspec.train.layer import PackedLayer
from pdspec.train.packing import Example, Packed
from pdspec.train.precision import product
from pdspec.train.scoring import StepScores, draft_ids_of, rms, score

BLOCK = 256  # rows of probabilities over the whole vocabulary at a time
EMBEDDING = "model.embed_tokens.weight"


def new_tensors(config: ModelConfig, embedding: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Starting weights under Hugging Face keys. ``embedding`` [V, target's width] is projected on the directions in
    which it varies most; what a layer adds starts small."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in weight_shapes(config).items():
        scale = 0.02 / (2 * config.num_layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        tensors[name] = scale * torch.randn(shape, generator=random) if len(shape) > 1 else torch.ones(shape)
    _, directions = torch.linalg.eigh(embedding.T @ embedding)  # ascending
    leading = embedding @ directions[:, -config.hidden_size :]
    tensors[EMBEDDING] = leading / leading.norm(dim=1).mean()  # logits of about 1
    return tensors


class DraftModelTrainer:
    """The model as torch autograd sees it. ``parameters`` have Hugging Face keys, float32; ``target_output`` are the
    target's output rows [V, H]."""

    def __init__(
        self, config: ModelConfig, parameters: dict[str, torch.nn.Parameter], target_output: torch.Tensor,
        max_positions: int,
    ) -> None:  # fmt: skip
        self.objective = LOSSES[0]
        self.config, self.parameters, self.target_output = config, parameters, target_output
        self.target_ids = torch.arange(config.vocab_size)
        self.draft_ids = draft_ids_of(self.target_ids, config.vocab_size)
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
        x = F.embedding(torch.cat([example.tokens[:-1] for example in examples]), self.parameters[EMBEDDING])
        for layer in self.layers:
            x = layer.whole(rms(x, layer.weight("input_layernorm"), eps), x, positions, bounds)
        return rms(x, self.parameters["model.norm.weight"], eps)[positions > 0]

    def steps(self, examples: Sequence[Example], num_steps: int, *, rank: int = 0) -> list[StepScores]:
        """Scores of a chain's first ``num_steps`` positions, see Trainer."""
        packed, hidden = Packed(examples), self.hidden(examples)
        return [self._step(packed, hidden, step, rank) for step in range(num_steps)]

    def _step(self, packed: Packed, hidden: torch.Tensor, step: int, rank: int) -> StepScores:
        blocks = []
        for rows in packed.query[packed.alive(step)].split(BLOCK):
            where = packed.final_row[rows] + step
            first, last = int(where[0]), int(where[-1])
            with torch.no_grad():
                teacher_p = product(packed.final[first : last + 1], self.target_output).softmax(-1)
            blocks.append(score(
                hidden[rows + step], self.parameters[EMBEDDING], packed, rows, step, teacher_p=teacher_p,
                draft_ids=self.draft_ids, rank=rank, objective=self.objective, first=first,
            ))  # fmt: skip
        return _joined(blocks)

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """Of the next token alone; ``num_steps`` is EAGLE-3's."""
        (one,) = self.steps(examples, 1)
        return one.loss, [one]

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the model, int8. Raises ConfigError when the folder cannot be written."""
        tensors = {name: value.detach().clone() for name, value in self.parameters.items()}
        save_trained(folder, self.config, tensors, identity, dict(card))

    def about(self) -> str:
        """One sentence of its card on what it is made of."""
        config = self.config
        return (f"a decoder of {config.num_layers} layers, {config.hidden_size} wide, over the target's whole"
                f" vocabulary, embedding and output rows in one.")


def _joined(blocks: Sequence[StepScores]) -> StepScores:
    """Scores of parts of one step as those of the whole."""
    shares = torch.stack([one.counted.sum() for one in blocks]).float()
    losses = torch.stack([one.loss for one in blocks])
    ranked = [one.ranked for one in blocks if one.ranked is not None]
    return StepScores(
        torch.cat([one.rows for one in blocks]), (losses * shares).sum() / shares.sum().clamp(min=1),
        torch.cat([one.hits for one in blocks]), torch.cat([one.counted for one in blocks]),
        torch.cat(ranked) if ranked else None,
    )  # fmt: skip
