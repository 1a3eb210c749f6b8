"""YaRN (Peng et al. 2023, 2309.00071): long contexts by stretching the slow rotations only.

    r        = how often a dimension turns within the original context
    1 / freq = theta^(2i/D), times ``factor`` where r < beta_slow, untouched where r > beta_fast, a ramp between them
    cos, sin = times the attention factor, 0.1 mscale ln(factor) + 1 (over that with mscale_all_dim, if both are set)

DeepSeek sets both alike, so that cos and sin are not touched, and puts the square of mscale_all_dim's factor into the
softmax scale instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 ``weight`` ln ``factor`` + 1 for a context that is stretched, else 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def attention_factor(scaling: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied with."""
    if scaling.get("attention_factor"):
        return float(scaling["attention_factor"])
    factor, own, all_dims = float(scaling["factor"]), scaling.get("mscale"), scaling.get("mscale_all_dim")
    return mscale(factor, own) / mscale(factor, all_dims) if own and all_dims else mscale(factor)


def softmax_factor(scaling: Mapping[str, Any] | None) -> float:
    """What DeepSeek's attention multiplies 1 / sqrt(D) with."""
    all_dims = (scaling or {}).get("mscale_all_dim")
    return mscale(float(scaling["factor"]), all_dims) ** 2 if scaling and all_dims else 1.0


def stretch(inverse: torch.Tensor, theta: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Frequencies [D/2] float64 of the rule, from the unscaled ones."""
    dim, original = 2 * len(inverse), float(scaling["original_max_position_embeddings"])

    def dimension(turns: float) -> float:
        """That turns so often within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(scaling.get("beta_fast") or 32)), dimension(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(len(inverse), dtype=torch.float64) - low) / (high - low or 0.001)
    slow = ramp.clamp(0, 1)
    return inverse / float(scaling["factor"]) * slow + inverse * (1 - slow)
