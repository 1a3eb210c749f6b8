"""A decoder's layers shared out among the ranks of one worker (tensor parallelism; Megatron-LM, 1909.08053, section 3).

Each rank holds whole groups of KV heads with the query heads that read them, and columns of the MLP. Where heads cannot
be shared evenly the first ranks hold one more: 3 KV heads and 9 query heads on two ranks are 2 with 6, and 1 with 3.

    q, k, v, gate, up    rows of the rank's heads or columns        the whole input
    o, down              their columns                              a partial sum of the output, which all ranks add up

Norms are held by every rank. Embedding and lm_head are not shared out: the first rank has them whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from pdspec.errors import ConfigError
from pdspec.model.config import ModelConfig, layer_shapes

BLOCK = 16  # MLP columns go in blocks of so many: the CPU kernels' least inner size


@dataclass(frozen=True, kw_only=True)
class Part:
    """What ``rank`` of ``ranks`` holds, as half-open ranges."""

    rank: int
    ranks: int
    kv_heads: tuple[int, int]
    columns: tuple[int, int]  # of the MLP's inner size

    @property
    def num_kv_heads(self) -> int:
        """How many KV heads."""
        return self.kv_heads[1] - self.kv_heads[0]

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The decoder that this rank's layers look like."""
        group = whole.num_heads // whole.num_kv_heads
        first, last = self.columns
        return replace(
            whole, num_kv_heads=self.num_kv_heads, num_heads=group * self.num_kv_heads, intermediate_size=last - first
        )

    def take(self, whole: ModelConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of all layers' tensors, under their keys; ``weights`` stays as it is. Copies nothing but
        columns."""
        return {
            f"model.layers.{layer}.{name}": self._cut(whole, name, weights[f"model.layers.{layer}.{name}"])
            for layer in range(whole.num_layers)
            for name in layer_shapes(whole, layer)
        }

    def _cut(self, whole: ModelConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
        head, group = whole.head_dim, whole.num_heads // whole.num_kv_heads
        kv = slice(*(head * bound for bound in self.kv_heads))
        q = slice(*(group * head * bound for bound in self.kv_heads))
        columns = slice(*self.columns)
        match name.split(".")[-2]:
            case "q_proj":
                return tensor[q]
            case "k_proj" | "v_proj":
                return tensor[kv]
            case "o_proj":
                return tensor[:, q].contiguous()
            case "gate_proj" | "up_proj":
                return tensor[columns]
            case "down_proj":
                return tensor[:, columns].contiguous()
        return tensor  # norms


def split(config: ModelConfig, ranks: int) -> tuple[Part, ...]:
    """The parts of ``ranks`` ranks, in order. Raises ConfigError where one would have nothing to hold, and for layers
    that are not built to be shared out."""
    if config.mla is not None or config.moe is not None:
        kind = "latent attention" if config.mla is not None else "experts"
        raise ConfigError(
            f"layers with {kind} are not shared out among ranks", field="tp", remedy="use tp 1 with this model"
        )
    most = min(config.num_kv_heads, config.intermediate_size // BLOCK)
    if ranks > most:
        raise ConfigError(
            f"{config.name} has {config.num_kv_heads} KV heads, and a rank holds one at least", field="tp",
            remedy=f"use tp {most} or less",
        )
    blocks = config.intermediate_size // BLOCK
    columns = [(BLOCK * first, BLOCK * last) for first, last in shares(blocks, ranks)]
    columns[-1] = columns[-1][0], config.intermediate_size
    heads = shares(config.num_kv_heads, ranks)
    return tuple(
        Part(rank=rank, ranks=ranks, kv_heads=heads[rank], columns=columns[rank]) for rank in range(ranks)
    )


def shares(count: int, ranks: int) -> list[tuple[int, int]]:
    """``count`` things as ranges, one for each rank; the first ranks have one more where it does not come out even."""
    bounds = [rank * (count // ranks) + min(rank, count % ranks) for rank in range(ranks + 1)]
    return list(pairwise(bounds))
