"""EAGLE-1 for the training loop."""

from __future__ import annotations

from pathlib import Path

from pdspec.spec.eagle1.checkpoint import load_head
from pdspec.spec.eagle1.config import Eagle1Config
from pdspec.train.eagle1 import Eagle1Trainer, new_tensors
from pdspec.train.recipe import Start, Weights, frozen, refuse_recount, target_parts

TITLE = "EAGLE-1"
DEPTH = 5
_POSITIONS = 2048  # of an evaluation


def new(start: Start) -> Eagle1Trainer:
    """See Recipe. Raises ConfigError for ``recount``: the output rows are the target's, start anew for others."""
    config = start.config
    refuse_recount(config)
    head = load_head(config.head) if config.head else None
    target_ids = start.target_ids() if head is None else head.target_ids
    if head is None:
        geometry = Eagle1Config.for_target(
            start.files.config, len(target_ids), intermediate_size=config.intermediate
        )
        tensors = new_tensors(geometry, start.weights, start.files.config.num_layers, config.seed)
    else:
        geometry, tensors = head.config, head.tensors
    parts = target_parts(start.weights, target_ids)
    return Eagle1Trainer(geometry, start.parameters(tensors), target_ids, parts, start.positions)


def load(folder: Path, weights: Weights) -> Eagle1Trainer:
    """See Recipe."""
    head = load_head(folder)
    parameters = frozen(head.tensors)
    return Eagle1Trainer(head.config, parameters, head.target_ids, target_parts(weights, head.target_ids), _POSITIONS)
