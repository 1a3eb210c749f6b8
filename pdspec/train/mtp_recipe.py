"""MTP for the training loop."""

from __future__ import annotations

from pathlib import Path

from pdspec.spec.mtp.checkpoint import load_head
from pdspec.spec.mtp.config import MtpConfig
from pdspec.train.mtp import MtpTrainer, new_tensors
from pdspec.train.recipe import Start, Weights, frozen, refuse_recount, target_parts

TITLE = "MTP"
DEPTH = 2
_POSITIONS = 2048  # of an evaluation


def new(start: Start) -> MtpTrainer:
    """See Recipe. Raises ConfigError for ``recount``: the output rows are the target's, start anew for others."""
    config = start.config
    refuse_recount(config)
    head = load_head(config.head) if config.head else None
    target_ids = start.target_ids() if head is None else head.target_ids
    if head is None:
        geometry = MtpConfig.for_target(
            start.files.config, len(target_ids), num_modules=DEPTH, intermediate_size=config.intermediate
        )
        tensors = new_tensors(geometry, start.weights, start.files.config.num_layers, config.seed)
    else:
        geometry, tensors = head.config, head.tensors
    parts = target_parts(start.weights, target_ids)
    return MtpTrainer(geometry, start.parameters(tensors), target_ids, parts, start.positions)


def load(folder: Path, weights: Weights) -> MtpTrainer:
    """See Recipe."""
    head = load_head(folder)
    parameters = frozen(head.tensors)
    return MtpTrainer(head.config, parameters, head.target_ids, target_parts(weights, head.target_ids), _POSITIONS)
