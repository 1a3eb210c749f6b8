"""The target's kind of latent attention (``model.layers``) as one draft layer's: its pages hold latent rows as well."""

from __future__ import annotations

import torch

from pdspec.model.batch import ForwardBatch
from pdspec.model.layers import LatentAttention
from pdspec.spec.attention import Queries


class LatentDraftAttention:
    """``layer`` over ``pages`` of one layer; used as ``attention.Attention``."""

    def __init__(self, layer: LatentAttention, pages: torch.Tensor) -> None:
        self._layer, self._pages = layer, pages

    def store(self, x: torch.Tensor, batch: ForwardBatch) -> Queries:
        """Writes the KV rows of inputs [R, H] and returns their queries."""
        return Queries(self._layer.store(x, batch, self._pages))

    def attend(self, queries: Queries, batch: ForwardBatch) -> torch.Tensor:
        """[R, H]: what attention adds to these rows."""
        out = torch.zeros(batch.num_rows, self._layer.hidden_size, device=queries.q.device)
        self._layer.attend(queries.q, batch, self._pages, out)
        return out
