"""The head's forward pass (SafeAILab/EAGLE, eagle/model/cnets1.py), spelled out with ``Ops``.

f_i   the target's hidden state of row i *after its final norm* (``outputs[0]`` of its decoder, which is what its
      lm_head reads), or, while drafting, the parent's output: the head is trained to give the next such state
t_i+1 the token that follows row i
x   = fc(cat(embed(t_i+1), f_i))                               [R, H]; no norm before attention
a   = x + attention(x)                                         RoPE position i
out = a + mlp(post_attention_layernorm(a))                     the next feature; there is no final norm
log q(t_i+2) = log_softmax(lm_head(out))                       the target's lm_head, or its rows of the draft ids
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import DTYPES, PagedCache
from pdspec.model.batch import ForwardBatch
from pdspec.model.ops import Ops
from pdspec.spec.attention import Attention, SwiGlu, draft_rope, row_index
from pdspec.spec.eagle1.checkpoint import Head
from pdspec.spec.embedding import own_embedding
from pdspec.spec.feature_rows import output_rows, take_rows
from pdspec.spec.protocol import HiddenRows


class Eagle1Head:
    """Packed weights of a head over the pages of cache group ``group``. ``embedding`` and ``lm_head`` are the target's,
    packed by the same ``ops``; of the latter a head with a draft vocabulary takes a copy of its rows."""

    def __init__(
        self,
        head: Head,
        *,
        ops: Ops,
        embedding: Any,
        lm_head: Any,
        cache: PagedCache,
        group: str,
        dtype: str,
        max_positions: int,
    ) -> None:
        self.ops, self.config = ops, head.config
        self.embedding = own_embedding(head, embedding, ops, dtype)
        self.max_positions = max_positions
        self._pages = self._pages_of(cache, group)
        self._rope = draft_rope(head.config, max_positions, ops.device)

        def tensor(name: str) -> torch.Tensor:
            return head.tensors[name if name.startswith("fc.") else f"layers.0.{name}"]

        self._fc = ops.pack(tensor("fc.weight").to(DTYPES[dtype]))
        self._fc_bias = tensor("fc.bias").float().to(ops.device) if head.config.bias else None
        self._attention = Attention(head.config, tensor, ops=ops, dtype=dtype, pages=self._pages, rope=self._rope)
        self._mlp = SwiGlu(tensor, "mlp", ops=ops, dtype=dtype)
        self._post_norm = tensor("post_attention_layernorm.weight").float().to(ops.device)
        self._lm_head = output_rows(ops, lm_head, head.target_ids, DTYPES[dtype])

    def over(self, cache: PagedCache, group: str) -> Eagle1Head:
        """The same weights over the pages of another cache group. Raises ValueError for one of another layout."""
        other = copy.copy(self)
        other._pages = self._pages_of(cache, group)
        other._attention = self._attention.over(other._pages)
        return other

    def _pages_of(self, cache: PagedCache, group: str) -> torch.Tensor:
        wanted = self.config.layer_group(group, cache.layout(group).dtype)
        if cache.layout(group) != wanted:
            raise ValueError(f"the cache has {cache.layout(group)} where the head needs {wanted}")
        return cache.group(group)[0]

    def features(self, hidden: HiddenRows) -> torch.Tensor:
        """The target's final hidden states of rows, [R, H]. Raises ValueError when they were not asked for."""
        if hidden.final is None:
            raise ValueError("the target's final hidden states were not captured")
        return hidden.final.to(self.ops.device)

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """Writes the draft KV rows of all R rows and returns the layer's output [len(outputs), H] of the rows named in
        ``outputs``: a row's KV needs its input alone, so rows that only fill the cache skip attention and MLP."""
        if batch.num_rows and int(batch.positions.max()) >= self.max_positions:
            raise ValueError(f"draft position {int(batch.positions.max())} of {self.max_positions}")
        ops, eps = self.ops, self.config.rms_norm_eps
        x = ops.linear(torch.cat((ops.embed(self.embedding, batch.token_ids), features), 1), self._fc, self._fc_bias)
        queries = self._attention.store(x, batch)
        if len(outputs) < batch.num_rows:
            rows = row_index(outputs, ops.device)
            queries, x, batch = queries.take(rows), x[rows], take_rows(batch, outputs)
        if batch.num_rows == 0:
            return x
        hidden = x + self._attention.attend(queries, batch)
        return hidden + self._mlp(ops.rms_norm(hidden, self._post_norm, eps))

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, draft vocabulary] float32 of layer outputs [R, H]."""
        return self.ops.linear(outputs, self._lm_head)
