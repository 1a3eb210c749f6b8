"""The target's forward over the layers of all ranks, as the first rank leads it.

    rank 0   embed ─ tell batch ─ tell layers ─┬─ own part of each layer ─ add up ─ … ─ norm, lm_head
    others          hear batch ── hear layers ─┴─ own part of each layer ─ add up ─ …

Partial sums are added in float32 after each ``o_proj`` and ``down_proj``, so every rank goes on with the same x.
"""

from __future__ import annotations

import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.model.config import ModelConfig
from pdspec.model.ops import Ops
from pdspec.model.runner import OnLayer, OnQueries, RunLayers, Runner, make_layers, run_layers
from pdspec.model.split import Part
from pdspec.parallel.group import Group
from pdspec.parallel.messages import tell_batch, tell_layers


class ParallelRunner(Runner):
    """The first rank's; to everyone else it is a ``Runner`` of the whole target. RankLost ends a forward that another
    rank does not answer."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], *, ops: Ops, dtype: str, part: Part, ranks: Group
    ) -> None:
        self._part, self._ranks = part, ranks
        super().__init__(config, weights, ops=ops, dtype=dtype)

    def forward(
        self, batch: ForwardBatch, cache: PagedCache, on_layer: OnLayer | None = None,
        on_queries: OnQueries | None = None,
    ) -> ForwardOutput:
        """See ``Runner``. Raises ConfigError for ``on_queries``: nobody has the queries of all heads."""
        if on_queries is not None:
            raise ConfigError("queries of other ranks cannot be shown", field="tp", remedy="use tp 1")
        return super().forward(batch, cache, on_layer)

    def _load_layers(self, weights: dict[str, torch.Tensor]) -> RunLayers:
        taken = self._part.take(self.config, weights)
        self.layers = make_layers(self._part.config(self.config), taken, self.ops, self.rope, self.dtype)
        return self._all_ranks

    def _all_ranks(self, batch: ForwardBatch, cache: PagedCache, x: torch.Tensor, first: int, last: int) -> None:
        if first == last:
            return
        if first == 0:
            tell_batch(self._ranks, batch, x)
        tell_layers(self._ranks, first, last)
        pages = cache.group(self.group.name)
        run_layers(
            self.layers[first:last], self.ops, self.config.rms_norm_eps, batch, pages[first:last], x,
            add_up=self._ranks.add_up,
        )  # fmt: skip
