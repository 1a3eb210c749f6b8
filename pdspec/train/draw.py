"""One token for each of many conversations, drawn from large logits in few passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

BLOCK = 128  # ids whose mass is summed at once; a sum is much faster than a running sum


@torch.inference_mode()
def sample_tokens(
    logits: torch.Tensor, temperature: Sequence[float], min_p: Sequence[float], uniform: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """One token per row of ``logits`` [S, V], which are overwritten, by inverse transform, and the best one: two int64
    [S].

    Temperature 0 takes the best. ``min_p`` drops tokens less likely than that share of the best one's chance.
    """
    top, best = logits.max(-1, keepdim=True)
    heat = torch.tensor([max(t, 1e-6) for t in temperature])[:, None]
    mass = logits.sub_(top).div_(heat).exp_()  # 1 for the best token
    for floor in {floor for floor in min_p if floor > 0}:
        rows = torch.tensor([row for row, one in enumerate(min_p) if one == floor])
        kept = mass[rows]
        mass[rows] = kept.masked_fill_(kept < floor, 0.0)
    drawn = _inverse(mass, torch.tensor(uniform, dtype=mass.dtype)[:, None])
    greedy = torch.tensor([t <= 0 for t in temperature])[:, None]
    return torch.where(greedy, best, drawn)[:, 0].numpy(), best[:, 0].numpy()


def _inverse(mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The id [S, 1] at which the running sum of ``mass`` [S, V] passes ``uniform`` [S, 1] of the whole: first the block
    of ids, then the id in it."""
    size = mass.shape[1]
    whole = size // BLOCK * BLOCK
    sums = mass[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    before = torch.cat((sums, mass[:, whole:].sum(-1, keepdim=True)), 1).cumsum(1)
    wanted = uniform * before[:, -1:]
    block = torch.searchsorted(before, wanted, right=True).clamp_(max=before.shape[1] - 1)
    ids = block * BLOCK + torch.arange(BLOCK)
    inside = mass.gather(1, ids.clamp(max=size - 1)).masked_fill_(ids >= size, 0.0)
    start = torch.where(block > 0, before.gather(1, (block - 1).clamp(min=0)), 0.0)
    place = torch.searchsorted(inside.cumsum(1), wanted - start, right=True)
    # where rounding leaves the block's end below ``wanted``, its last id that has any mass
    last = torch.where(inside > 0, torch.arange(BLOCK), -1).amax(1, keepdim=True)
    return torch.minimum(ids[:, :1] + torch.minimum(place, last.clamp(min=0)), torch.tensor(size - 1))
