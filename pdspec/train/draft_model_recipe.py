"""A small draft model for the training loop."""

from __future__ import annotations

from pathlib import Path

from pdspec.errors import ConfigError
from pdspec.model.config import ModelConfig
from pdspec.spec.draft_model.trained import load_trained
from pdspec.train.draft_model import DraftModelTrainer, new_tensors
from pdspec.train.recipe import Start, Weights, frozen, output_rows, refuse_recount

TITLE = "Draft-model"
DEPTH = 5
WIDEST = 128  # of a new model, unless asked for: with 49 152 output rows it fits 8 MB as int8
HEAD_DIM = 32
_POSITIONS = 2048  # of an evaluation


def new(start: Start) -> DraftModelTrainer:
    """See Recipe. Raises ConfigError for ``recount``: it drafts from the whole vocabulary."""
    refuse_recount(start.config)
    if start.config.head:
        config, tensors, _ = load_trained(start.config.head)
    else:
        config = _geometry(start)
        tensors = new_tensors(config, start.weights["model.embed_tokens.weight"], start.config.seed)
    return DraftModelTrainer(config, start.parameters(tensors), output_rows(start.weights), start.positions)


def load(folder: Path, weights: Weights) -> DraftModelTrainer:
    """See Recipe."""
    config, tensors, _ = load_trained(folder)
    return DraftModelTrainer(config, frozen(tensors), output_rows(weights), _POSITIONS)


def _geometry(start: Start) -> ModelConfig:
    target, wanted = start.files.config, start.config
    hidden = wanted.hidden or min(WIDEST, target.hidden_size // 2 // HEAD_DIM * HEAD_DIM)
    if hidden < HEAD_DIM or hidden % HEAD_DIM or wanted.layers < 1:
        raise ConfigError(f"no draft model is {hidden} wide with {wanted.layers} layers", field="hidden",
                          remedy=f"choose a multiple of {HEAD_DIM}, and at least one layer")
    return ModelConfig(
        name="draft-model", architecture="LlamaForCausalLM", num_layers=wanted.layers, hidden_size=hidden,
        num_heads=hidden // HEAD_DIM, num_kv_heads=hidden // HEAD_DIM, head_dim=HEAD_DIM,
        intermediate_size=wanted.intermediate or 4 * hidden, vocab_size=target.vocab_size,
        rms_norm_eps=target.rms_norm_eps, rope_theta=target.rope_theta, rope_scaling=target.rope_scaling,
        max_context=target.max_context, tie_embeddings=True, bos_ids=target.bos_ids, eos_ids=target.eos_ids,
    )  # fmt: skip
