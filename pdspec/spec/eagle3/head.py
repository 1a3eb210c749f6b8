"""The head's forward pass (SafeAILab/EAGLE, eagle/model/cnets.py), spelled out with ``Ops``.

    h_i   target features of row i (three layers' inputs, fused by ``fc``), or, while drafting, the parent's output
    t_i+1 the token that follows row i
    x   = cat(input_layernorm(embed(t_i+1)), hidden_norm(h_i))     [R, 2H]
    a   = h_i + attention(x)                                       RoPE position i; the residual is h before its norm
    out = a + mlp(post_attention_layernorm(a))                     the next feature, not normed
    log q(t_i+2) = log_softmax(lm_head(norm(out)))                 over draft ids
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import DTYPES, PagedCache
from pdspec.model.batch import ForwardBatch
from pdspec.model.native import NativeOps
from pdspec.model.ops import Ops, make_rope
from pdspec.spec.eagle3.checkpoint import Head
from pdspec.spec.eagle3.config import GROUP
from pdspec.spec.eagle3.native import NativeLayer
from pdspec.spec.protocol import HiddenRows

_ROW_FIELDS = ("token_ids", "positions", "sequence", "slots", "prefix_len", "ancestors")


class Eagle3Head:
    """Packed weights of a head. ``embedding`` is the target's, packed by the same ``ops``."""

    def __init__(
        self, head: Head, *, ops: Ops, embedding: Any, cache: PagedCache, dtype: str, max_positions: int
    ) -> None:
        self.ops, self.embedding, self.config = ops, embedding, head.config
        self.max_positions = max_positions
        wanted = head.config.cache_group(cache.layout(GROUP).dtype)
        if cache.layout(GROUP) != wanted:
            raise ValueError(f"the cache has {cache.layout(GROUP)} where the head needs {wanted}")
        self._pages = cache.group(GROUP)[0]
        self._rope = make_rope(head_dim=head.config.head_dim, theta=head.config.rope_theta,
                               max_positions=max_positions, scaling=head.config.rope_scaling, device=ops.device)

        def pack(*names: str) -> Any:
            return ops.pack(torch.cat([head.tensors[f"{name}.weight"] for name in names]).to(DTYPES[dtype]))

        def norm(name: str) -> torch.Tensor:
            return head.tensors[f"{name}.weight"].float().to(ops.device)

        self._fc = pack("fc")
        self._qkv = pack(*(f"midlayer.self_attn.{letter}_proj" for letter in "qkv"))
        self._o = pack("midlayer.self_attn.o_proj")
        self._gate_up = pack("midlayer.mlp.gate_proj", "midlayer.mlp.up_proj")
        self._down = pack("midlayer.mlp.down_proj")
        self._lm_head = pack("lm_head")
        self._input_norm, self._hidden_norm = norm("midlayer.input_layernorm"), norm("midlayer.hidden_norm")
        self._post_norm, self._norm = norm("midlayer.post_attention_layernorm"), norm("norm")
        self._native = self._native_layer(ops) if isinstance(ops, NativeOps) else None

    def _native_layer(self, ops: NativeOps) -> NativeLayer:
        weights = {"embedding": self.embedding, "qkv": self._qkv, "o": self._o, "gate_up": self._gate_up,
                   "down": self._down}
        norms = {"input_norm": self._input_norm, "hidden_norm": self._hidden_norm, "post_norm": self._post_norm}
        return NativeLayer(ops, self.config, self._rope, self._pages, weights, norms)

    def features(self, hidden: HiddenRows) -> torch.Tensor:
        """The fused features of target rows. Raises ValueError when the layers were not captured."""
        if hidden.captured is None:
            raise ValueError("the target's fused layers were not captured")
        return self.fuse(hidden.captured)

    def fuse(self, captured: torch.Tensor) -> torch.Tensor:
        """Target features [R, H] of captured hidden states [R, C, H] float32."""
        return self.ops.linear(captured.to(self.ops.device).flatten(1).contiguous(), self._fc)

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """Writes the draft KV rows of all R rows and returns the layer's output [len(outputs), H] of the rows named in
        ``outputs``: a row's KV needs its input alone, so rows that only fill the cache skip attention and MLP."""
        if batch.num_rows and int(batch.positions.max()) >= self.max_positions:
            raise ValueError(f"draft position {int(batch.positions.max())} of {self.max_positions}")
        if self._native is not None:
            return self._native(batch, features, outputs)
        ops, eps = self.ops, self.config.rms_norm_eps
        embedded = ops.rms_norm(ops.embed(self.embedding, batch.token_ids), self._input_norm, eps)
        x = torch.cat((embedded, ops.rms_norm(features, self._hidden_norm, eps)), 1)
        q = ops.rope_store(ops.linear(x, self._qkv), self._rope, batch, self._pages)
        if len(outputs) < batch.num_rows:
            rows = torch.from_numpy(outputs.astype(np.int64)).to(ops.device)
            q, features, batch = q[rows], features[rows], _rows(batch, outputs)
        if batch.num_rows == 0:
            return features
        hidden = features + ops.linear(ops.attend(q, batch, self._pages), self._o)
        gate_up = ops.linear(ops.rms_norm(hidden, self._post_norm, eps), self._gate_up)
        return hidden + ops.linear(ops.silu_mul(gate_up), self._down)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, draft vocabulary] float32 of layer outputs [R, H]."""
        return self.ops.linear(self.ops.rms_norm(outputs, self._norm, self.config.rms_norm_eps), self._lm_head)


def _rows(batch: ForwardBatch, rows: np.ndarray) -> ForwardBatch:
    """Some rows of a batch, in the order named."""
    taken: dict[str, Any] = {name: np.ascontiguousarray(getattr(batch, name)[rows]) for name in _ROW_FIELDS}
    return replace(batch, **taken)
