"""Training-time test draws the same chain that the drafter drafts, and its loss is the one of the paper."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pdspec.cache.paged import PagedCache
from pdspec.model.batch import ForwardBatch
from pdspec.model.loader import load_weights, resolve
from pdspec.model.ops import TorchOps
from pdspec.spec.eagle3.checkpoint import Head, random_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.eagle3.head import Eagle3Head
from pdspec.train.eagle3 import DECAY, Eagle3Trainer, new_tensors
from pdspec.train.packing import Example
from pdspec.train.scoring import TargetParts

FILES = resolve("tiny-3")
WEIGHTS = load_weights(FILES, "float32")
CONFIG = Eagle3Config.for_target(FILES.config, 96)
STEPS = 4


@pytest.fixture
def head() -> Head:
    return random_head(CONFIG, 5)


def trainer_of(head: Head) -> Eagle3Trainer:
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in head.tensors.items()}
    parts = TargetParts(WEIGHTS["model.embed_tokens.weight"], WEIGHTS["lm_head.weight"][head.target_ids])
    return Eagle3Trainer(head.config, parameters, head.target_ids, parts, 256)


def example(length: int, prompt: int, seed: int) -> Example:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, CONFIG.vocab_size, (length,), generator=random)
    hidden = torch.randn(length, 4, CONFIG.hidden_size, generator=random)
    best = torch.randint(0, CONFIG.vocab_size, (length,), generator=random)
    best[: prompt - 1] = -1
    best[-1] = -1
    return Example(tokens, best, hidden, prompt)


def drafted_logits(head: Head, one: Example, row: int, steps: int) -> list[torch.Tensor]:
    """Logits of a chain drafted from ``row``, token-forced, by the runtime's own head over its paged cache."""
    cache = PagedCache((CONFIG.cache_group("float32"),), 8, 16)
    ops = TorchOps(torch.device("cpu"))
    runtime = Eagle3Head(head, ops=ops, embedding=ops.pack(WEIGHTS["model.embed_tokens.weight"]), cache=cache,
                         dtype="float32", max_positions=256)  # fmt: skip

    def forward(start: int, features: torch.Tensor) -> torch.Tensor:
        count = len(features)
        slots = np.arange(start, start + count, dtype=np.int32)
        batch = ForwardBatch(
            token_ids=one.tokens[start + 1 : start + 1 + count].numpy().astype(np.int32), positions=slots,
            sequence=np.zeros(count, np.int32), slots=slots, prefix_len=slots + 1,
            ancestors=np.empty((count, 0), np.int32), page_table=np.arange(8, dtype=np.int32)[None],
            logit_rows=np.empty(0, np.int32),
        )  # fmt: skip
        return runtime.forward(batch, features, np.array([count - 1], np.int32))

    out = forward(0, runtime.fuse(one.hidden[: row + 1, :-1].contiguous()))
    logits = [runtime.logits(out)[0]]
    for step in range(1, steps):
        out = forward(row + step, out)
        logits.append(runtime.logits(out)[0])
    return logits


def test_each_step_is_the_chain_that_the_drafter_drafts(head: Head) -> None:
    examples = [example(15, 9, 1), example(8, 4, 2), example(21, 20, 3)]
    scores = trainer_of(head).steps(examples, STEPS, rank=CONFIG.draft_vocab_size)
    compared = 0
    for step, score in enumerate(scores):
        assert score.ranked is not None
        for (number, row), ranked in zip(score.rows.tolist(), score.ranked, strict=True):
            logits = drafted_logits(head, examples[number], row, step + 1)[-1]
            ordered = logits[ranked]
            assert bool((ordered.diff() <= 1e-4).all()), (step, number, row)
            compared += 1
    # rows n-2 .. N-3 of step 0, one less per step
    assert compared == sum(max(0, len(e.tokens) - e.prompt_tokens - j) for e in examples for j in range(STEPS))


def test_the_loss_is_cross_entropy_with_the_target_over_the_draft_vocabulary(head: Head) -> None:
    one = example(14, 6, 4)
    trainer = trainer_of(head)
    loss, scores = trainer.loss([one], 3)
    expected = []
    for step, score in enumerate(scores):
        losses = []
        for _, row in score.rows.tolist():
            best = int(one.best[row + 1 + step])
            if best < 0 or int(trainer.draft_ids[best]) < 0:
                continue
            p = (trainer.parts.output @ one.hidden[row + 1 + step, -1]).softmax(0)
            q = drafted_logits(head, one, row, step + 1)[-1].log_softmax(0)
            losses.append(float(-(p * q).sum()))
        assert int(score.counted.sum()) == len(losses) > 0
        expected.append(sum(losses) / len(losses))
        assert float(score.loss.detach()) == pytest.approx(expected[-1], rel=1e-4)
    weights = [DECAY**j for j in range(3)]
    assert float(loss.detach()) == pytest.approx(np.average(expected, weights=weights), rel=1e-4)


def test_gradients_are_those_of_the_loss(head: Head) -> None:
    examples = [example(12, 3, 5), example(9, 4, 6)]
    trainer = trainer_of(head)
    loss, _ = trainer.loss(examples, 3)
    loss.backward()
    random = torch.Generator().manual_seed(0)
    for name, parameter in trainer.parameters.items():
        assert parameter.grad is not None, name
        way = torch.randn(parameter.shape, generator=random)
        way /= way.norm()
        size = 2e-2
        values = []
        for sign in (1, -1):
            moved = {
                k: torch.nn.Parameter(v.detach() + (sign * size * way if k == name else 0))
                for k, v in trainer.parameters.items()
            }
            other = Eagle3Trainer(CONFIG, moved, head.target_ids, trainer.parts, 256)
            with torch.no_grad():
                values.append(float(other.loss(examples, 3)[0]))
        slope = (values[0] - values[1]) / (2 * size)
        assert float((parameter.grad * way).sum()) == pytest.approx(slope, rel=0.05, abs=2e-3), name


def test_prompt_tokens_are_read_but_not_learnt(head: Head) -> None:
    one = example(24, 12, 7)
    (score,) = trainer_of(head).steps([one], 1)
    assert score.rows[:, 1].tolist() == list(range(10, 22))
    other = replace(one, best=torch.full_like(one.best, -1))
    (score,) = trainer_of(head).steps([other], 1)
    assert float(score.loss.detach()) == 0.0 and not bool(score.counted.any())


def test_new_heads_start_from_the_target() -> None:
    ids = torch.arange(0, 192, 2)
    tensors = new_tensors(CONFIG, WEIGHTS, ids, FILES.config.num_layers, 0)
    assert torch.equal(tensors["lm_head.weight"], WEIGHTS["lm_head.weight"][ids])
    assert torch.equal(tensors["norm.weight"], WEIGHTS["model.norm.weight"])
    assert {name: tuple(p.shape) for name, p in tensors.items()} == CONFIG.matrix_shapes() | CONFIG.norm_shapes()
