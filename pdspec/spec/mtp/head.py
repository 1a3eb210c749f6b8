"""The forward pass of MTP modules (DeepSeek-V3 report, 2.2; keys and order as in DeepSeek's checkpoint), with ``Ops``.

    module m, row i, RoPE position i; h^0_i is the target's hidden state
    x     = eh_proj(cat(enorm(embed(t_i+m)), hnorm(h^{m-1}_i)))      the embedding first
    a     = x + attention(input_layernorm(x))
    h^m_i = shared_head.norm(a + mlp(post_attention_layernorm(a)))
    log q(t_i+m+1) = log_softmax(lm_head(h^m_i))                      the target's lm_head, or some of its rows

Which h a module reads, before or after the norm in front of the logits, the report does not say. Here it is after: h^0
has passed the target's final norm, h^m ``shared_head.norm``. So SGLang (deepseek_nextn) and today's vLLM (deepseek_mtp)
serve DeepSeek's weights; older vLLM fed h^m back before its norm. vLLM also zeroes the embedding of row 0, SGLang does
not: here it is a row like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import DTYPES, PagedCache
from pdspec.errors import Incompatible
from pdspec.model.batch import ForwardBatch
from pdspec.model.layers import Experts, LatentAttention, LayerTensors
from pdspec.model.ops import Ops, Rope, make_rope
from pdspec.spec.attention import Attention, SwiGlu, Tensor, draft_rope, row_index
from pdspec.spec.embedding import is_same
from pdspec.spec.feature_rows import take_rows
from pdspec.spec.mtp.checkpoint import LM_HEAD, Head
from pdspec.spec.mtp.config import group_name
from pdspec.spec.mtp.latent import LatentDraftAttention
from pdspec.spec.protocol import HiddenRows
from pdspec.spec.stored import EMBEDDING


class MtpModule:
    """Packed weights of module ``module`` = 1..N over its cache group: a ``FeatureModel`` of its own, which is what one
    module that is reused for every depth is. ``embedding`` and ``lm_head`` (rows of the draft ids) are the target's,
    packed by the same ``ops``."""

    def __init__(
        self, head: Head, module: int, *, ops: Ops, embedding: Any, lm_head: Any, rope: Rope, cache: PagedCache,
        dtype: str,
    ) -> None:
        self.ops, self.config, self.module = ops, head.config, module
        self.max_positions = len(rope.cos)
        self._embedding, self._lm_head, self._rope = embedding, lm_head, rope
        group = group_name(module)
        wanted = head.config.cache_group(module, cache.layout(group).dtype)
        if cache.layout(group) != wanted:
            raise ValueError(f"the cache has {cache.layout(group)} where the module needs {wanted}")
        self._pages, prefix = cache.group(group)[0], head.config.prefix(module)

        def tensor(name: str) -> torch.Tensor:
            return head.tensors[f"{prefix}.{name}"]

        def norm(name: str) -> torch.Tensor:
            return tensor(f"{name}.weight").float().to(ops.device)

        self._eh_proj = ops.pack(tensor("eh_proj.weight").to(DTYPES[dtype]))
        tensors = LayerTensors(dict(head.tensors), prefix, ops, DTYPES[dtype])
        self._attention = self._make_attention(tensor, tensors, dtype)
        moe = head.config.moe
        self._mlp = Experts(moe, tensors) if moe else SwiGlu(tensor, "mlp", ops=ops, dtype=dtype)
        self._enorm, self._hnorm, self._norm = norm("enorm"), norm("hnorm"), norm("shared_head.norm")
        self._input_norm, self._post_norm = norm("input_layernorm"), norm("post_attention_layernorm")

    def _make_attention(
        self, tensor: Tensor, tensors: LayerTensors, dtype: str
    ) -> Attention | LatentDraftAttention:
        config, ops, pages, rope = self.config, self.ops, self._pages, self._rope
        if config.mla is None:
            return Attention(config, tensor, ops=ops, dtype=dtype, pages=pages, rope=rope)
        layer = LatentAttention(config.mla, config.num_heads, tensors, rope, config.rope_scaling)
        return LatentDraftAttention(layer, pages)

    def features(self, hidden: HiddenRows) -> torch.Tensor:
        """h^0 of target rows, [R, H]. Raises ValueError where the final hidden state was not asked for."""
        if hidden.final is None:
            raise ValueError("the target's final hidden state was not captured")
        return hidden.final.to(self.ops.device)

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """Writes the KV rows of all R rows, which read ``features`` [R, H], and returns h^m [len(outputs), H] of the
        rows named in ``outputs``: rows that only fill the cache skip attention and MLP."""
        if batch.num_rows and int(batch.positions.max()) >= self.max_positions:
            raise ValueError(f"draft position {int(batch.positions.max())} of {self.max_positions}")
        ops, eps = self.ops, self.config.rms_norm_eps
        embedded = ops.rms_norm(ops.embed(self._embedding, batch.token_ids), self._enorm, eps)
        x = ops.linear(torch.cat((embedded, ops.rms_norm(features.contiguous(), self._hnorm, eps)), 1), self._eh_proj)
        queries = self._attention.store(ops.rms_norm(x, self._input_norm, eps), batch)
        if len(outputs) < batch.num_rows:
            rows = row_index(outputs, ops.device)
            queries, x, batch = queries.take(rows), x[rows], take_rows(batch, outputs)
        if batch.num_rows == 0:
            return x
        x = x + self._attention.attend(queries, batch)
        return ops.rms_norm(x + self._mlp(ops.rms_norm(x, self._post_norm, eps)), self._norm, eps)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, draft vocabulary] float32 of h^m [R, H]."""
        return self.ops.linear(outputs.contiguous(), self._lm_head)


def make_modules(
    head: Head, count: int, *, ops: Ops, embedding: Any, lm_head: Any, cache: PagedCache, dtype: str, max_positions: int
) -> list[MtpModule]:
    """The first ``count`` modules. ``embedding`` and ``lm_head`` are the target's, whole. Raises Incompatible when the
    head repeats them and they are others."""
    config = head.config
    for key, tensor in head.shared.items():
        packed = embedding if key.endswith(EMBEDDING) else lm_head
        if not is_same(tensor, packed, ops, dtype):
            name = LM_HEAD if key.endswith(LM_HEAD) else EMBEDDING
            raise Incompatible(f"{key} is not the target's, with which modules share it", field=name,
                               remedy="choose the modules made for this target")
    if config.draft_vocab_size < config.vocab_size:
        rows = ops.embed(lm_head, head.target_ids.numpy().astype(np.int32))
        lm_head = ops.pack(rows.to(DTYPES[dtype]))
    rope = draft_rope(config, max_positions, ops.device) if config.mla is None else make_rope(
        head_dim=config.mla.rope_head_dim, theta=config.rope_theta, max_positions=max_positions,
        scaling=config.rope_scaling, device=ops.device,
    )
    return [
        MtpModule(head, module, ops=ops, embedding=embedding, lm_head=lm_head, rope=rope, cache=cache, dtype=dtype)
        for module in range(1, count + 1)
    ]


class MtpSeries:
    """Modules 1..N as the model of ``MtpDrafter``, which calls their forwards itself. What it keeps of a token is the
    stack of outputs that the next token's rows read, [n, H], the one that predicts the next token first."""

    def __init__(self, modules: Sequence[MtpModule]) -> None:
        self.modules = modules
        self.ops, self.config, self.max_positions = modules[0].ops, modules[0].config, modules[0].max_positions
        self.features = modules[0].features

    def forward(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """Of one module alone there is none."""
        raise TypeError("rows of modules in series are spread over several forwards")

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """[R, draft vocabulary] float32 of stacks [R, n, H]: all modules share the target's lm_head."""
        return self.modules[0].logits(outputs[:, 0])
