"""The head's forward pass (SafeAILab/EAGLE, eagle/model/cnets.py), spelled out with ``Ops``.

    h_i   target features of row i (three layers' inputs, fused by ``fc``), or, while drafting, the parent's output
    t_i+1 the token that follows row i
    x   = cat(input_layernorm(embed(t_i+1)), hidden_norm(h_i))     [R, 2H]
    a   = h_i + attention(x)                                       RoPE position i; the residual is h before its norm
    out = a + mlp(post_attention_layernorm(a))                     the next feature, not normed
    log q(t_i+2) = log_softmax(lm_head(norm(out)))                 over draft ids

speculators has heads whose residual is h after its norm (``norm_before_residual``), and whose levels are normed as one
row before ``fc`` (``norm_before_fc``). EAGLE-3.1 (2605.09992; vLLM's llama_eagle3.py) has two variants: ``fc_norm``
norms each level before ``fc``, and with ``norm_output`` the next feature is norm(out), which ``lm_head`` reads as is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import DTYPES, PagedCache
from pdspec.model.batch import ForwardBatch
from pdspec.model.native import NativeOps, Packed
from pdspec.model.ops import Ops
from pdspec.spec.attention import Attention, SwiGlu, draft_rope, row_index
from pdspec.spec.eagle3.checkpoint import Head
from pdspec.spec.eagle3.config import GROUP
from pdspec.spec.eagle3.native import NativeLayer
from pdspec.spec.embedding import own_embedding
from pdspec.spec.feature_rows import output_rows, take_rows
from pdspec.spec.protocol import HiddenRows

Layer = Callable[[ForwardBatch, torch.Tensor, np.ndarray], torch.Tensor]


class Eagle3Head:
    """Packed weights of a head. ``embedding`` and ``lm_head`` are the target's, packed by the same ``ops``; a head with
    output rows of its own reads no ``lm_head``."""

    def __init__(
        self, head: Head, *, ops: Ops, embedding: Any, cache: PagedCache, dtype: str, max_positions: int,
        lm_head: Any = None,
    ) -> None:
        self.ops, self.config = ops, head.config
        self.embedding = own_embedding(head, embedding, ops, dtype)
        self.max_positions = max_positions
        wanted = head.config.cache_group(cache.layout(GROUP).dtype)
        if cache.layout(GROUP) != wanted:
            raise ValueError(f"the cache has {cache.layout(GROUP)} where the head needs {wanted}")
        self._pages = cache.group(GROUP)[0]
        self._rope = draft_rope(head.config, max_positions, ops.device)

        def norm(name: str) -> torch.Tensor:
            return head.tensors[f"{name}.weight"].float().to(ops.device)

        self._fc = ops.pack(head.tensors["fc.weight"].to(DTYPES[dtype]))
        if head.config.tied_output:
            self._lm_head = output_rows(ops, lm_head, head.target_ids, DTYPES[dtype])
        else:
            self._lm_head = ops.pack(head.tensors["lm_head.weight"].to(DTYPES[dtype]))
        self._input_norm, self._hidden_norm = norm("midlayer.input_layernorm"), norm("midlayer.hidden_norm")
        self._post_norm, self._norm = norm("midlayer.post_attention_layernorm"), norm("norm")
        levels = range(len(head.config.fused_layers) if head.config.fc_norm else 0)
        self._fc_norms = [norm(f"fc_norm.{level}") for level in levels]
        self._levels_norm = norm("input_norm") if head.config.norm_before_fc else None
        if isinstance(ops, NativeOps) and head.config.is_plain:
            self._layer: Layer = self._native_layer(head, ops, dtype)
        else:
            self._attention, self._mlp = self._spell_out(head, dtype)
            self._layer = self._spelled_out

    def _spell_out(self, head: Head, dtype: str) -> tuple[Attention, SwiGlu]:
        def tensor(name: str) -> torch.Tensor:
            return head.tensors[f"midlayer.{name}"]

        attention = Attention(head.config, tensor, ops=self.ops, dtype=dtype, pages=self._pages, rope=self._rope)
        return attention, SwiGlu(tensor, "mlp", ops=self.ops, dtype=dtype)

    def _native_layer(self, head: Head, ops: NativeOps, dtype: str) -> NativeLayer:
        def pack(*names: str) -> Packed:
            return ops.pack(torch.cat([head.tensors[f"midlayer.{name}.weight"] for name in names]).to(DTYPES[dtype]))

        weights = {
            "embedding": self.embedding, "qkv": pack(*(f"self_attn.{letter}_proj" for letter in "qkv")),
            "o": pack("self_attn.o_proj"), "gate_up": pack("mlp.gate_proj", "mlp.up_proj"),
            "down": pack("mlp.down_proj"),
        }
        norms = {"input_norm": self._input_norm, "hidden_norm": self._hidden_norm, "post_norm": self._post_norm}
        return NativeLayer(ops, self.config, self._rope, self._pages, weights, norms)

    def features(self, hidden: HiddenRows) -> torch.Tensor:
        """The fused features of target rows. Raises ValueError when the layers were not captured."""
        if hidden.captured is None:
            raise ValueError("the target's fused layers were not captured")
        return self.fuse(hidden.captured)

    def fuse(self, captured: torch.Tensor) -> torch.Tensor:
        """Target features [R, H] of captured hidden states [R, C, H] float32."""
        levels = captured.to(self.ops.device)
        if self._fc_norms:
            eps, split = self.config.rms_norm_eps, levels.unbind(1)
            normed = [self.ops.rms_norm(x.contiguous(), w, eps) for x, w in zip(split, self._fc_norms, strict=True)]
            return self.ops.linear(torch.cat(normed, 1), self._fc)
        row = levels.flatten(1).contiguous()
        if self._levels_norm is not None:
            row = self.ops.rms_norm(row, self._levels_norm, self.config.rms_norm_eps)
        return self.ops.linear(row, self._fc)

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """Writes the draft KV rows of all R rows and returns the next features [len(outputs), H] of the rows named in
        ``outputs``: a row's KV needs its input alone, so rows that only fill the cache skip attention and MLP."""
        if batch.num_rows and int(batch.positions.max()) >= self.max_positions:
            raise ValueError(f"draft position {int(batch.positions.max())} of {self.max_positions}")
        out = self._layer(batch, features, outputs)
        return self._normed(out) if self.config.norm_output else out

    def _spelled_out(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        ops, eps = self.ops, self.config.rms_norm_eps
        embedded = ops.rms_norm(ops.embed(self.embedding, batch.token_ids), self._input_norm, eps)
        normed = ops.rms_norm(features, self._hidden_norm, eps)
        queries = self._attention.store(torch.cat((embedded, normed), 1), batch)
        residual = normed if self.config.norm_before_residual else features
        if len(outputs) < batch.num_rows:
            rows = row_index(outputs, ops.device)
            queries, residual, batch = queries.take(rows), residual[rows], take_rows(batch, outputs)
        if batch.num_rows == 0:
            return residual
        hidden = residual + self._attention.attend(queries, batch)
        return hidden + self._mlp(ops.rms_norm(hidden, self._post_norm, eps))

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, draft vocabulary] float32 of what ``forward`` returned, [R, H]."""
        return self.ops.linear(outputs if self.config.norm_output else self._normed(outputs), self._lm_head)

    def _normed(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(outputs, self._norm, self.config.rms_norm_eps)

