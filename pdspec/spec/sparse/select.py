"""SnapKV's choice (Li et al. 2024, 2404.14469): the prompt rows that the last rows of the prompt attend to most.

The last 32 prompt rows are run once more, into scratch slots behind the prompt, and their attention to each prompt row
is summed over rows, heads and layers; a row counts as much as the best of its 7 neighbours, so that spans are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.model.runner import Runner
from pdspec.spec.draft_rows import DraftRows, pack_rows
from pdspec.spec.protocol import DraftContext
from pdspec.spec.sparse.config import OBSERVED, Ints

NEIGHBOURS = 7


def choose_rows(runner: Runner, cache: PagedCache, ctx: DraftContext, count: int) -> Ints:
    """[min(count, n)] prompt rows, ascending; the last ``OBSERVED`` are among them. ``count`` is at least that."""
    if ctx.prompt_len <= count:
        return np.arange(ctx.prompt_len, dtype=np.int32)
    mass = attention_mass(runner, cache, ctx)
    pooled = torch.nn.functional.max_pool1d(mass[None], NEIGHBOURS, stride=1, padding=NEIGHBOURS // 2)[0].cpu().numpy()
    pooled[-OBSERVED:] = np.inf
    return np.sort(np.argsort(-pooled, kind="stable")[:count]).astype(np.int32)


def attention_mass(runner: Runner, cache: PagedCache, ctx: DraftContext) -> torch.Tensor:
    """[n] float32: the softmax attention that each of the prompt's n KV rows gets from the last ``OBSERVED`` ones,
    summed over them, heads and layers. The prompt's KV rows are only read."""
    n, first = ctx.prompt_len, max(0, ctx.prompt_len - OBSERVED)
    rows = range(first, n)
    scratch = range(n, n + len(rows))
    again = DraftRows(
        ctx=ctx, token_ids=ctx.token_ids[first:n], positions=rows, slots=scratch, prefix=[first] * len(rows),
        paths=[scratch[: i + 1] for i in range(len(rows))],
    )
    mass = torch.zeros(n, device=cache.device)
    flat = _flat_rows(cache, ctx.pages, n)
    position = torch.arange(first, n, device=cache.device)[:, None]
    future = torch.arange(n, device=cache.device) > position  # [rows, n]

    def add(layer: int, q: torch.Tensor) -> None:
        keys = cache.group(runner.group.name)[layer].flatten(0, 1)[flat, 0]  # [n, kv heads, D]
        dim, heads = keys.shape[2], keys.shape[1]
        q = q.unflatten(1, (heads, -1)) / math.sqrt(dim)  # [rows, kv heads, group, D]
        for head in range(heads):
            scores = torch.einsum("rgd,nd->grn", q[:, head], keys[:, head].float())
            mass.add_(scores.masked_fill(future, -math.inf).softmax(-1).sum((0, 1)))

    runner.forward(pack_rows([again], cache.page_size), cache, on_queries=add)
    return mass


def _flat_rows(cache: PagedCache, pages: Sequence[int], count: int) -> torch.Tensor:
    rows = torch.arange(count, device=cache.device)
    return torch.tensor(pages, device=cache.device)[rows // cache.page_size] * cache.page_size + rows % cache.page_size
