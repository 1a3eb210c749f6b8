"""Medusa for the training loop."""

from __future__ import annotations

from pathlib import Path

from pdspec.spec.medusa.checkpoint import load_heads
from pdspec.spec.medusa.config import MedusaConfig
from pdspec.train.medusa import MedusaTrainer, new_tensors
from pdspec.train.recipe import Start, Weights, frozen, refuse_recount, target_parts

TITLE = "Medusa"
DEPTH = 4


def new(start: Start) -> MedusaTrainer:
    """See Recipe. Raises ConfigError for ``recount``: nothing of these heads depends on the draft vocabulary, start
    new ones with another."""
    refuse_recount(start.config)
    heads = load_heads(start.config.head) if start.config.head else None
    target_ids = start.target_ids() if heads is None else heads.target_ids
    config = MedusaConfig.for_target(start.files.config, len(target_ids)) if heads is None else heads.config
    tensors = new_tensors(config) if heads is None else heads.tensors
    return MedusaTrainer(config, start.parameters(tensors), target_ids, target_parts(start.weights, target_ids))


def load(folder: Path, weights: Weights) -> MedusaTrainer:
    """See Recipe."""
    heads = load_heads(folder)
    parameters = frozen(heads.tensors)
    return MedusaTrainer(heads.config, parameters, heads.target_ids, target_parts(weights, heads.target_ids))
