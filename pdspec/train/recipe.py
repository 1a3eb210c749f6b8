"""What the training loop asks of a draft family: ``pdspec/train/<family>_recipe.py``.

trainer = recipe("eagle3").new(start)      weights as autograd sees them
trainer.loss(examples, steps)              one step's loss and its scores
trainer.save(folder, identity, card)       int8, with the card's figures
recipe("eagle3").load(folder, weights)     to evaluate what was saved
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from pdspec.errors import ConfigError, UnknownName
from pdspec.model.files import ModelFiles
from pdspec.spec.heads import TargetIdentity
from pdspec.train.config import TrainConfig
from pdspec.train.packing import Example
from pdspec.train.scoring import StepScores, TargetParts
from pdspec.train.vocab import draft_vocabulary

RECIPES = ("eagle3", "eagle1", "medusa", "mtp", "draft_model")
Weights = Mapping[str, torch.Tensor]


def output_rows(weights: Weights) -> torch.Tensor:
    """The target's output matrix [V, H], tied or not."""
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])


def frozen(tensors: Weights) -> dict[str, torch.nn.Parameter]:
    """A saved head's tensors as a trainer holds them, to be evaluated."""
    return {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}


def refuse_recount(config: TrainConfig) -> None:
    """Raises ConfigError where output rows are the target's: nothing learnt depends on the draft vocabulary."""
    if config.recount:
        raise ConfigError(
            "these heads learn no output rows", field="recount", remedy="leave --recount out, or start new ones"
        )


def target_parts(weights: Weights, target_ids: torch.Tensor) -> TargetParts:
    """Embedding and the output rows of a draft vocabulary."""
    return TargetParts(weights["model.embed_tokens.weight"], output_rows(weights)[target_ids].clone())


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with. ``weights`` are the target's, float32, under Hugging Face keys; ``counts`` [V] of the
    answers' tokens; ``state`` of the run that is resumed."""

    config: TrainConfig
    files: ModelFiles
    weights: dict[str, torch.Tensor]
    counts: np.ndarray
    state: dict[str, Any] | None

    def target_ids(self) -> torch.Tensor:
        """The draft vocabulary of a new head, or that of the run that is resumed."""
        if self.state is not None:
            ids: torch.Tensor = self.state["target_ids"]
            return ids
        return draft_vocabulary(self.counts, self.config.draft_vocab)

    def parameters(self, tensors: Weights) -> dict[str, torch.nn.Parameter]:
        """``tensors``, or the weights of the run that is resumed."""
        chosen = tensors if self.state is None else self.state["parameters"]
        return {name: torch.nn.Parameter(tensor.clone()) for name, tensor in chosen.items()}

    @property
    def positions(self) -> int:
        """Rows of the RoPE table that training needs."""
        return min(self.files.config.max_context, 2 * self.config.max_length)


class Trainer(Protocol):
    """A head under training. ``draft_ids`` [V]: the draft id of each target id, -1 where it has none.
    ``objective``: one of ``divergence.LOSSES``; the training loop sets it."""

    parameters: dict[str, torch.nn.Parameter]
    target_ids: torch.Tensor
    draft_ids: torch.Tensor
    objective: str

    def steps(self, examples: Sequence[Example], num_steps: int, *, rank: int = 0) -> list[StepScores]:
        """Scores of the first ``num_steps`` draft positions; ``rank``: how many best draft ids to return per row."""

    def loss(self, examples: Sequence[Example], num_steps: int) -> tuple[torch.Tensor, list[StepScores]]:
        """The loss of a batch, and the scores it is made of."""

    def save(self, folder: Path, identity: TargetIdentity | None, card: Mapping[str, Any]) -> None:
        """Writes the head, int8. Raises ConfigError when the folder cannot be written."""

    def about(self) -> str:
        """One sentence of its card on what it is made of."""


class Recipe(Protocol):
    """A ``<family>_recipe.py`` module. ``DEPTH`` draft positions are evaluated."""

    TITLE: str
    DEPTH: int

    def new(self, start: Start) -> Trainer:
        """With the weights of the run that is resumed, of the head to start from, or new ones. Raises ConfigError."""

    def load(self, folder: Path, weights: Weights) -> Trainer:
        """A saved head, to be evaluated. Raises CheckpointError."""


def recipe(name: str) -> Recipe:
    """Raises UnknownName."""
    if name not in RECIPES:
        raise UnknownName(f"no recipe for {name!r}", field="drafter", remedy="choose one of " + ", ".join(RECIPES))
    return cast(Recipe, import_module(f"pdspec.train.{name}_recipe"))
