"""A small draft model for the training loop."""

from __future__ import annotations

from pathlib import Path

from pdspec.spec.draft_model.trained import load_trained
from pdspec.train.draft_model import DraftModelTrainer, geometry_of, new_tensors
from pdspec.train.recipe import Start, Weights, frozen, refuse_recount, target_parts

TITLE = "Draft-model"
DEPTH = 5
_POSITIONS = 2048  # of an evaluation


def new(start: Start) -> DraftModelTrainer:
    """See Recipe. Raises ConfigError for ``recount``."""
    refuse_recount(start.config)
    wanted, target = start.config, start.files.config
    if wanted.head:
        head = load_trained(wanted.head)
        config, tensors, target_ids = head.config, head.tensors, head.target_ids
    else:
        config, target_ids = geometry_of(target, wanted.layers, wanted.intermediate), start.target_ids()
        tensors = new_tensors(config, target, start.weights)
    parts = target_parts(start.weights, target_ids)
    return DraftModelTrainer(config, start.parameters(tensors), target_ids, parts, start.positions)


def load(folder: Path, weights: Weights) -> DraftModelTrainer:
    """See Recipe."""
    head = load_trained(folder)
    parts = target_parts(weights, head.target_ids)
    return DraftModelTrainer(head.config, frozen(head.tensors), head.target_ids, parts, _POSITIONS)
