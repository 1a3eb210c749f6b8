"""EAGLE-3 for the training loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdspec.spec.eagle3.checkpoint import load_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.train.eagle3 import Eagle3Trainer, new_tensors
from pdspec.train.recipe import Start, Weights, frozen, output_rows, target_parts
from pdspec.train.vocab import move_rows

TITLE = "EAGLE-3"
DEPTH = 5
_POSITIONS = 2048  # of an evaluation


def new(start: Start) -> Eagle3Trainer:
    """See Recipe; with ``recount`` the draft vocabulary of the head to start from is chosen anew."""
    config, weights = start.config, start.weights
    head = load_head(config.head) if config.head else None
    if head is not None:
        target_ids = start.target_ids() if config.recount else head.target_ids
        tied = head.config.tied_output or config.tied_output
        geometry = replace(head.config, draft_vocab_size=len(target_ids), tied_output=tied)
        tensors = dict(head.tensors)
        own = tensors.pop("lm_head.weight", None)
        if not tied and own is not None:
            tensors["lm_head.weight"] = move_rows(own, head.target_ids, target_ids, output_rows(weights))
    else:
        target_ids = start.target_ids()
        geometry = Eagle3Config.for_target(start.files.config, len(target_ids),
                                           intermediate_size=config.intermediate, tied_output=config.tied_output)
        tensors = new_tensors(geometry, weights, target_ids, start.files.config.num_layers, config.seed)
    parts = target_parts(weights, target_ids)
    return Eagle3Trainer(geometry, start.parameters(tensors), target_ids, parts, start.positions)


def load(folder: Path, weights: Weights) -> Eagle3Trainer:
    """See Recipe."""
    head = load_head(folder)
    parameters = frozen(head.tensors)
    return Eagle3Trainer(head.config, parameters, head.target_ids, target_parts(weights, head.target_ids), _POSITIONS)
