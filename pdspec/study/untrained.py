"""Heads that are ready to know one text by heart: small, random, and with nothing to lean on but what they are handed.

* the RoPE base is low, so that every pair of queries and keys tells a row from its neighbour;
* what reads the target's features whitens the text's own, so that what distinguishes them is as large as what they have
  in common, and whatever none of them contains is large, too;
* EAGLE-1's head reads its own outputs with no norm between: it is whitened less, lest each step multiply them, and in
  training every other row reads the output of some other row. So what it drafts cannot all be written into the first
  output: later tokens have to be found where the draft KV says.

The target's distribution is sharpened to its greedy choices; where a head's logits are made with the target's own
output rows, they are not sharpened with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pdspec.model.config import ModelConfig
from pdspec.spec.eagle1 import checkpoint as eagle1_file
from pdspec.spec.eagle1.config import Eagle1Config
from pdspec.spec.eagle3 import checkpoint as eagle3_file
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.heads import TargetIdentity
from pdspec.spec.medusa import checkpoint as medusa_file
from pdspec.spec.medusa.config import MedusaConfig
from pdspec.spec.mtp import checkpoint as mtp_file
from pdspec.spec.mtp.config import MtpConfig
from pdspec.train.eagle1 import Eagle1Trainer
from pdspec.train.eagle3 import Eagle3Trainer
from pdspec.train.medusa import MedusaTrainer
from pdspec.train.mtp import MtpTrainer
from pdspec.train.scoring import TargetParts, rms

RIDGE, EAGLE1_RIDGE = 0.001, 3.0  # of the largest singular value but one: what whitening adds to all of them
ROPE_THETA = 2.0
INTERMEDIATE, EAGLE1_INTERMEDIATE = 64, 32
EAGLE1_TOKENS = 2.0  # root mean square of what the tokens add to EAGLE-1's input, where the features add 1
MISTAKEN = 0.5  # share of EAGLE-1's later rows that read another row's output
QUERY_GAIN = 2.0  # attention picks a few rows
ATTENTION_GAIN = {"eagle1": 2.0, "mtp": 4.0}  # what attention picks must count beside the whitened feature
OUTPUT_GAIN = 0.3  # of the random output rows: logits start flat
SHARPNESS = 64.0  # the target's distribution at temperature 1/64: its greedy choices, near ties too


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a head is made for: ``hidden`` [N, C+1, H] of the text's rows (``train.examples.hidden_rows``), the target
    ids that it has, the target's embedding and output rows float32 [V, H]; ``depth`` tokens are drafted ahead."""

    target: ModelConfig
    hidden: torch.Tensor
    vocabulary: torch.Tensor
    embedding: torch.Tensor
    output: torch.Tensor
    depth: int
    seed: int

    @property
    def parts(self) -> TargetParts:
        """What is borrowed of the target while training."""
        return TargetParts(self.embedding, SHARPNESS * self.output[self.vocabulary])

    @property
    def positions(self) -> int:
        """Rows and as many again: those of chains."""
        return 2 * (len(self.hidden) + 1)

    def whitening(self, features: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
        """``whitening`` of [N, K] to the target's width."""
        return whitening(features, self.target.hidden_size, self.seed, ridge)

    def geometry(self, config: Any) -> Any:
        """A layer's config with a RoPE base that tells neighbours apart."""
        return replace(config, rope_theta=ROPE_THETA, rope_scaling=None)


class Distrustful(Eagle1Trainer):
    """Its own logits are not sharpened with the target's, and what it carries from step to step is often another
    row's."""

    def __init__(self, *of_a_trainer: Any, seed: int) -> None:
        super().__init__(*of_a_trainer)
        self._random = torch.Generator().manual_seed(seed)

    def carried(self, output: torch.Tensor) -> torch.Tensor:
        """Of each row its own output or, as often, any row's."""
        mistaken = torch.rand(len(output), generator=self._random) < MISTAKEN
        others = torch.randint(len(output), (len(output),), generator=self._random)
        return torch.where(mistaken[:, None], output.detach()[others], output)

    def scored(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Through the target's output rows as they are."""
        return output / SHARPNESS, self.parts.output


def _eagle3(lesson: Lesson) -> Eagle3Trainer:
    config = lesson.geometry(
        Eagle3Config.for_target(lesson.target, len(lesson.vocabulary), intermediate_size=INTERMEDIATE)
    )
    tensors = eagle3_file.random_head(config, lesson.seed).tensors
    tensors["lm_head.weight"] *= OUTPUT_GAIN
    for letter in "qk":
        tensors[f"midlayer.self_attn.{letter}_proj.weight"] *= QUERY_GAIN
    tensors["fc.weight"] = lesson.whitening(lesson.hidden[1:-1, :-1].flatten(1))
    return Eagle3Trainer(config, _parameters(tensors), lesson.vocabulary, lesson.parts, lesson.positions)


def _eagle1(lesson: Lesson) -> Eagle1Trainer:
    config = lesson.geometry(
        Eagle1Config.for_target(
            lesson.target, len(lesson.vocabulary), intermediate_size=EAGLE1_INTERMEDIATE, bias=False
        )
    )
    tensors = eagle1_file.random_head(config, lesson.seed).tensors
    for letter in "qk":
        tensors[f"layers.0.self_attn.{letter}_proj.weight"] *= QUERY_GAIN
    tensors["layers.0.self_attn.o_proj.weight"] *= ATTENTION_GAIN["eagle1"]
    of_token, of_feature = tensors["fc.weight"].split(config.hidden_size, dim=1)
    of_feature.copy_(lesson.whitening(lesson.hidden[:-1, -1], EAGLE1_RIDGE))
    read = lesson.embedding[lesson.vocabulary] @ of_token.T
    of_token.mul_(EAGLE1_TOKENS / read.square().mean().sqrt())
    return Distrustful(
        config, _parameters(tensors), lesson.vocabulary, lesson.parts, lesson.positions, seed=lesson.seed
    )


def _mtp(lesson: Lesson) -> MtpTrainer:
    config = lesson.geometry(
        MtpConfig.for_target(lesson.target, len(lesson.vocabulary), lesson.depth, intermediate_size=INTERMEDIATE)
    )
    tensors = mtp_file.random_head(config, lesson.seed).tensors
    for module in range(1, config.num_modules + 1):
        prefix = config.prefix(module)
        for letter in "qk":
            tensors[f"{prefix}.self_attn.{letter}_proj.weight"] *= QUERY_GAIN
        tensors[f"{prefix}.self_attn.o_proj.weight"] *= ATTENTION_GAIN["mtp"]
        tensors[f"{prefix}.shared_head.norm.weight"] /= SHARPNESS  # which the output rows are multiplied by
    first = config.prefix(1)
    normed = rms(lesson.hidden[1:-1, -1], tensors[f"{first}.hnorm.weight"], config.rms_norm_eps)
    tensors[f"{first}.eh_proj.weight"][:, config.hidden_size :] = lesson.whitening(normed)
    return MtpTrainer(config, _parameters(tensors), lesson.vocabulary, lesson.parts, lesson.positions)


def _medusa(lesson: Lesson) -> MedusaTrainer:
    config = replace(
        MedusaConfig.for_target(lesson.target, len(lesson.vocabulary), num_heads=lesson.depth), own_lm_heads=True
    )
    tensors = medusa_file.random_heads(config, lesson.seed).tensors
    matrix = lesson.whitening(lesson.hidden[1:-1, -1])
    for head in range(config.num_heads):
        tensors[f"{head}.0.linear.weight"] = matrix.clone()
        tensors[f"{head}.{config.num_layers}.weight"] *= OUTPUT_GAIN
    return MedusaTrainer(config, _parameters(tensors), lesson.vocabulary, lesson.parts)


UNTRAINED: dict[str, Callable[[Lesson], Any]] = {
    "eagle1": _eagle1, "eagle2": _eagle1, "eagle3": _eagle3, "mtp": _mtp, "medusa": _medusa,
}  # fmt: skip
_FILES: dict[type, tuple[type, Callable[[Path, Any], None]]] = {
    Eagle1Trainer: (eagle1_file.Head, eagle1_file.save_head), Eagle3Trainer: (eagle3_file.Head, eagle3_file.save_head),
    MtpTrainer: (mtp_file.Head, mtp_file.save_head), MedusaTrainer: (medusa_file.Heads, medusa_file.save_heads),
}  # fmt: skip


def save(trainer: Any, folder: Path, identity: TargetIdentity) -> None:
    """A trainer's head as it is, float32. Raises ConfigError when the folder cannot be written."""
    make, write = next(found for kind, found in _FILES.items() if isinstance(trainer, kind))
    tensors = {name: tensor.detach().clone() for name, tensor in trainer.parameters.items()}
    write(folder, make(config=trainer.config, tensors=tensors, target_ids=trainer.target_ids, target=identity))


def whitening(features: torch.Tensor, hidden: int, seed: int, ridge: float = RIDGE) -> torch.Tensor:
    """float32 [hidden, K] that turns rows [N, K] into rows of mean square 1 along directions of their own: a random
    projection of (FᵀF + λ²)^(-1/2), F scaled per column, λ = ``ridge`` × its second singular value."""
    rows_NK = features.double()
    scale_K = rows_NK.std(0).clamp(min=1e-6)
    _, singular, right_RK = torch.linalg.svd(rows_NK / scale_K, full_matrices=False)
    floor = ridge * singular[1]
    gain_R = 1 / (singular.square() + floor.square()).sqrt() - 1 / floor
    generator = torch.Generator().manual_seed(seed + 1)
    random_HK = torch.randn(hidden, features.shape[1], generator=generator).double()
    matrix_HK = (random_HK / floor + (random_HK @ right_RK.T * gain_R) @ right_RK) / scale_K
    return (matrix_HK / (rows_NK @ matrix_HK.T).square().mean().sqrt()).float()


def _parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
