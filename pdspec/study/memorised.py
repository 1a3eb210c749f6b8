"""A text that the target writes by itself, and a head overfitted on it: the positive control of a handoff.

The text must leave the head no short cut, or a broken handoff would cost it nothing. So the target is made to copy
digits: ten tokens, in no order, none of which says what follows. The head is small and starts from random weights
(``untrained``). It is then trained as any head is (on its own outputs, the target's distribution, sharpened to its
greedy choices), on this text alone and without any breakage in sight.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.model.loader import load_weights, resolve
from pdspec.spec.heads import TargetIdentity
from pdspec.study.untrained import UNTRAINED, Lesson, save
from pdspec.telemetry import usable_cores
from pdspec.train.data import load_target
from pdspec.train.examples import hidden_rows
from pdspec.train.packing import Example
from pdspec.train.scoring import weighted
from pdspec.train.steps import CLIP, schedule
from pdspec.types import GenerateRequest, SamplingParams

DIGITS = 64  # copied twice in the prompt, once by the target
STEPS, MORE_STEPS = 160, {"eagle1": 800, "eagle2": 800}  # of training
LEARNING_RATE = 2e-3
WARMUP = 0.1
DECAY = 0.8  # of the loss, from one token ahead to the next


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


def memorise(
    config: WorkerConfig, folder: Path, *, depth: int, steps: int = 0, seed: int = 0, drafter: str = "eagle3"
) -> Memorised:
    """Writes the text with ``config``'s target and saves in ``folder`` a head of ``drafter`` (float32) that knows it by
    heart, trained for chains of ``depth`` (``steps`` 0: the family's). Raises ConfigError for a missing model."""
    files = resolve(config.model, config.cache_dir or None)
    target = load_target(config.model, dtype="float32", threads=config.threads, cache_dir=config.cache_dir or None)
    numbers = random.Random(1)
    line = "".join(str(numbers.randrange(10)) for _ in range(DIGITS)) + "\n"
    prompt = tuple(target.tokenizer.encode(line + line + line[:4]))
    tokens = greedy_text(config, prompt, DIGITS - 4)
    hidden = hidden_rows(target, np.array(tokens, np.int32))
    target.runner.ops.close()
    weights = load_weights(files, "float32")
    embedding = weights["model.embed_tokens.weight"]
    trainer = UNTRAINED[drafter](Lesson(
        target=files.config, hidden=hidden, vocabulary=torch.tensor(sorted(set(tokens))), embedding=embedding,
        output=weights.get("lm_head.weight", embedding), depth=depth, seed=seed,
    ))  # fmt: skip
    best = torch.tensor((*tokens[1:], -1))
    best[: len(prompt) - 1] = -1
    torch.set_num_threads(config.threads or usable_cores())
    example = Example(torch.tensor(tokens), best, hidden, len(prompt))
    loss, hits = _overfit(trainer, example, depth, steps or MORE_STEPS.get(drafter, STEPS))
    torch.set_num_threads(1)
    identity = TargetIdentity.of(files.config, content_hash=files.content_hash, tokenizer_hash=files.tokenizer_hash)
    save(trainer, folder, identity)
    return Memorised(tokens=tokens, start=len(prompt), hits=hits, loss=loss)


def _overfit(trainer: Any, example: Example, depth: int, steps: int) -> tuple[float, tuple[float, ...]]:
    """(last loss, share of tokens right per step of the last pass); the learning rate rises, then falls."""
    optimiser = torch.optim.AdamW(trainer.parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
    value, hits = math.nan, tuple[float, ...]()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step / steps, WARMUP)
        scores = trainer.steps([example], depth)
        loss = weighted([one.loss for one in scores], DECAY)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.parameters.values(), CLIP)
        optimiser.step()
        value = float(loss.detach())
        hits = tuple(float((s.hits & s.counted).sum() / s.counted.sum().clamp(min=1)) for s in scores)
    return value, hits
