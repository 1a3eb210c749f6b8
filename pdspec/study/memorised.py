"""A text that the target writes by itself, and a head overfitted on it: the positive control of a handoff.

The text must leave the head no short cut, or a broken handoff would cost it nothing. So the target is made to copy
digits: ten tokens, in no order, none of which says what follows. The head is small and starts from random weights:

* its RoPE base is low, so that every pair of its queries and keys tells a row from its neighbour;
* ``fc`` whitens the text's own features, so that what distinguishes them is as large as what they have in common,
  and whatever none of them contains is large, too.

It is then trained as any head is (training-time test, the target's distribution, sharpened to its greedy choices), on
this text alone and without any breakage in sight.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.model.loader import load_weights, resolve
from pdspec.spec.eagle3.checkpoint import random_head, save_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.heads import TargetIdentity
from pdspec.telemetry import usable_cores
from pdspec.train.data import load_target
from pdspec.train.eagle3 import Eagle3Trainer
from pdspec.train.examples import hidden_rows
from pdspec.train.loop import CLIP, schedule
from pdspec.train.packing import Example
from pdspec.train.scoring import TargetParts
from pdspec.types import GenerateRequest, SamplingParams

DIGITS = 64  # copied twice in the prompt, once by the target
STEPS = 160
LEARNING_RATE = 2e-3
WARMUP = 0.1
RIDGE = 0.001  # of the largest singular value but one: what whitening adds to all of them
ROPE_THETA = 2.0
INTERMEDIATE = 64
QUERY_GAIN = 2.0  # attention picks a few rows
OUTPUT_GAIN = 0.3  # of the random output rows: logits start flat
SHARPNESS = 64.0  # the target's distribution at temperature 1/64: its greedy choices, near ties too


@dataclass(frozen=True, kw_only=True)
class Memorised:
    """``tokens``: prompt, then the target's greedy continuation from ``start`` on. ``hits``: share of its tokens that
    the head had right in training, per training-time-test step."""

    tokens: tuple[int, ...]
    start: int
    hits: tuple[float, ...]
    loss: float


def greedy_text(config: WorkerConfig, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """``prompt`` and ``count`` tokens that the target continues it with; end tokens do not end it."""
    local = LocalGenerator(config.replace(drafters=("none",), drafter="none", heads={}))
    asked = GenerateRequest(
        request_id="text", prompt_ids=prompt, sampling=SamplingParams(max_tokens=count, seed=0, ignore_eos=True)
    )
    try:
        return (*prompt, *(token for chunk in local.generate(asked) for token in chunk.token_ids))
    finally:
        local.resources.close()


def memorise(config: WorkerConfig, folder: Path, *, depth: int, steps: int = STEPS, seed: int = 0) -> Memorised:
    """Writes the text with ``config``'s target and saves in ``folder`` a head (float32) that knows it by heart, trained
    for chains of ``depth``. Raises ConfigError for a model that is not there."""
    files = resolve(config.model, config.cache_dir or None)
    target = load_target(config.model, dtype="float32", threads=config.threads, cache_dir=config.cache_dir or None)
    numbers = random.Random(1)
    line = "".join(str(numbers.randrange(10)) for _ in range(DIGITS)) + "\n"
    prompt = tuple(target.tokenizer.encode(line + line + line[:4]))
    tokens = greedy_text(config, prompt, DIGITS - 4)
    hidden = hidden_rows(target, np.array(tokens, np.int32))
    target.runner.ops.close()
    vocabulary = torch.tensor(sorted(set(tokens)))
    geometry = replace(
        Eagle3Config.for_target(files.config, len(vocabulary), intermediate_size=INTERMEDIATE),
        rope_theta=ROPE_THETA, rope_scaling=None,
    )  # fmt: skip
    tensors = random_head(geometry, seed).tensors
    tensors["lm_head.weight"] *= OUTPUT_GAIN
    for letter in "qk":
        tensors[f"midlayer.self_attn.{letter}_proj.weight"] *= QUERY_GAIN
    tensors["fc.weight"] = whitening(hidden[1:-1, :-1].flatten(1), files.config.hidden_size, seed)
    weights = load_weights(files, "float32")
    embedding = weights["model.embed_tokens.weight"]
    output = weights.get("lm_head.weight", embedding)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    trainer = Eagle3Trainer(
        geometry, parameters, vocabulary, TargetParts(embedding, SHARPNESS * output[vocabulary]), 2 * len(tokens)
    )
    best = torch.tensor((*tokens[1:], -1))
    best[: len(prompt) - 1] = -1
    torch.set_num_threads(config.threads or usable_cores())
    example = Example(torch.tensor(tokens), best, hidden, len(prompt))
    loss, hits = _overfit(trainer, example, depth, steps)
    torch.set_num_threads(1)
    identity = TargetIdentity.of(files.config, content_hash=files.content_hash, tokenizer_hash=files.tokenizer_hash)
    save_head(folder, trainer.head(identity))
    return Memorised(tokens=tokens, start=len(prompt), hits=hits, loss=loss)


def whitening(features: torch.Tensor, hidden: int, seed: int) -> torch.Tensor:
    """float32 [hidden, K] that turns rows [N, K] into rows of mean square 1 along directions of their own: a random
    projection of (FᵀF + λ²)^(-1/2), F scaled per column."""
    rows_NK = features.double()
    scale_K = rows_NK.std(0).clamp(min=1e-6)
    _, singular, right_RK = torch.linalg.svd(rows_NK / scale_K, full_matrices=False)
    floor = RIDGE * singular[1]
    gain_R = 1 / (singular.square() + floor.square()).sqrt() - 1 / floor
    generator = torch.Generator().manual_seed(seed + 1)
    random_HK = torch.randn(hidden, features.shape[1], generator=generator).double()
    matrix_HK = (random_HK / floor + (random_HK @ right_RK.T * gain_R) @ right_RK) / scale_K
    return (matrix_HK / (rows_NK @ matrix_HK.T).square().mean().sqrt()).float()


def _overfit(trainer: Eagle3Trainer, example: Example, depth: int, steps: int) -> tuple[float, tuple[float, ...]]:
    """(last loss, share of tokens right per step of the last pass); the learning rate rises, then falls."""
    optimiser = torch.optim.AdamW(trainer.parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
    value, hits = math.nan, tuple[float, ...]()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step / steps, WARMUP)
        loss, scores = trainer.loss([example], depth)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), CLIP)
        optimiser.step()
        value = float(loss.detach())
        hits = tuple(float((s.hits & s.counted).sum() / s.counted.sum().clamp(min=1)) for s in scores)
    return value, hits
