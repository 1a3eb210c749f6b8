"""KV rows in host memory: what a sequence held, while its pages belong to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for


@dataclass(frozen=True, kw_only=True)
class ParkedRows:
    """Whole pages of some cache groups, by name ``[layers, pages, page_size, parts, kv_heads, head_dim]``."""

    parts: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Of all groups."""
        return sum(part.nbytes for part in self.parts.values())


def parked_bytes(cache: PagedCache, rows: Mapping[str, int]) -> int:
    """Bytes that ``park_rows`` would take."""
    sizes = ((cache.layout(name), pages_for(count, cache.page_size)) for name, count in rows.items())
    return sum(group.num_layers * group.row_bytes * count * cache.page_size for group, count in sizes)


def park_rows(cache: PagedCache, pages: Sequence[int], rows: Mapping[str, int]) -> ParkedRows:
    """A copy of the first ``rows[group]`` rows of each named group, in whole pages."""
    parts = {}
    for name, count in rows.items():
        used = torch.tensor(pages[: pages_for(count, cache.page_size)], dtype=torch.int64, device=cache.device)
        parts[name] = cache.group(name).index_select(1, used).cpu()
    return ParkedRows(parts=parts)


def unpark_rows(cache: PagedCache, pages: Sequence[int], parked: ParkedRows) -> None:
    """The inverse, into other pages. Raises ValueError where there are too few."""
    for name, part in parked.parts.items():
        if part.shape[1] > len(pages):
            raise ValueError(f"{part.shape[1]} parked pages of {name} for {len(pages)}")
        into = torch.tensor(pages[: part.shape[1]], dtype=torch.int64, device=cache.device)
        cache.group(name).index_copy_(1, into, part.to(cache.device))
