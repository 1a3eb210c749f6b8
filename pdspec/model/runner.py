"""The target's forward pass over one packed batch: ``ForwardBatch`` in, ``ForwardOutput`` out.

On a CPU layers of Llama's kind all run inside one call into the kernels (the GIL is released meanwhile); others, and
elsewhere all, are spelled out with ``Ops``. ``on_layer`` is called after each layer: then its KV rows can leave.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from pdspec.cache.paged import DTYPES, PagedCache
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.model.config import ModelConfig
from pdspec.model.layers import LayerTensors, make_layer
from pdspec.model.native import NativeOps
from pdspec.model.native_layers import NativeLayers, check_sizes
from pdspec.model.ops import Ops, make_rope

OnLayer = Callable[[int], None]
OnQueries = Callable[[int, torch.Tensor], None]  # layer, q [R, heads, D] after RoPE, not divided by the root of D


class Runner:
    """A decoder with packed weights. ``weights`` has Hugging Face keys, in ``dtype`` (KV rows are in ``dtype`` too); it
    is emptied while packing, so that no second copy stays in memory. ``group`` names the cache group of its KV rows."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], *, ops: Ops, dtype: str = "bfloat16",
        group: str = "target",
    ) -> None:
        self.config, self.ops, self.dtype = config, ops, dtype
        if isinstance(ops, NativeOps):
            check_sizes(config)
        self.group = config.cache_group(group, dtype)
        self.rope = make_rope(
            head_dim=config.rope_dim,
            theta=config.rope_theta,
            max_positions=config.max_context,
            scaling=config.rope_scaling,
            device=ops.device,
        )
        self.embedding = ops.pack(weights["model.embed_tokens.weight"])
        self.lm_head = self.embedding if config.tie_embeddings else ops.pack(weights.pop("lm_head.weight"))
        self.final_norm = weights.pop("model.norm.weight").float().to(ops.device)
        self.layers = [
            make_layer(config, i, LayerTensors(weights, f"model.layers.{i}", ops, DTYPES[dtype]), self.rope)
            for i in range(config.num_layers)
        ]
        weights.clear()
        self._native = None
        if isinstance(ops, NativeOps) and config.mla is None and config.moe is None:
            bf16 = DTYPES[dtype] == torch.bfloat16
            self._native = NativeLayers(config, self.layers, ops, self.rope, group, bf16=bf16)

    def forward(
        self, batch: ForwardBatch, cache: PagedCache, on_layer: OnLayer | None = None,
        on_queries: OnQueries | None = None,
    ) -> ForwardOutput:
        """One forward of R rows; writes their KV rows. Positions must be below ``max_context``. With ``on_queries``,
        which is shown every layer's queries, the layers are spelled out: slower, and other bits."""
        if batch.num_rows and int(batch.positions.max()) >= self.config.max_context:
            raise ConfigError(
                f"position {int(batch.positions.max())} is beyond the context of {self.config.max_context}",
                field="max_tokens",
                remedy="ask for fewer tokens",
            )
        x = self.ops.embed(self.embedding, batch.token_ids)
        captured = torch.empty(len(batch.capture), *x.shape, device=self.ops.device) if batch.capture else None
        run = self._native or self._spelled_out
        if on_queries is not None:
            run = partial(self._spelled_out, on_queries=on_queries)
        stops = sorted(
            {*batch.capture, self.config.num_layers} if on_layer is None else range(self.config.num_layers + 1)
        )
        first = 0
        with torch.inference_mode():
            for stop in stops:
                run(batch, cache, x, first, stop)
                if on_layer is not None and stop > first:
                    on_layer(stop - 1)
                if captured is not None and stop in batch.capture:
                    captured[batch.capture.index(stop)] = x
                first = stop
            return self._output(batch, x, captured)

    def _output(self, batch: ForwardBatch, x: torch.Tensor, captured: torch.Tensor | None) -> ForwardOutput:
        rows = torch.from_numpy(batch.logit_rows.astype(np.int64)).to(self.ops.device)
        if batch.want_final:
            final = self.ops.rms_norm(x, self.final_norm, self.config.rms_norm_eps)
            wanted = final[rows]
        else:
            final, wanted = None, self.ops.rms_norm(x[rows], self.final_norm, self.config.rms_norm_eps)
        return ForwardOutput(
            logits=self.ops.linear(wanted, self.lm_head),
            captured=None if captured is None else captured.transpose(0, 1).contiguous(),
            final=final,
        )

    def _spelled_out(
        self, batch: ForwardBatch, cache: PagedCache, x: torch.Tensor, first: int, last: int,
        on_queries: OnQueries | None = None,
    ) -> None:
        ops, eps, pages = self.ops, self.config.rms_norm_eps, cache.group(self.group.name)
        for index in range(first, last):
            layer = self.layers[index]
            q = layer.attention.store(ops.rms_norm(x, layer.input_norm, eps), batch, pages[index])
            if on_queries is not None:
                on_queries(index, q)
            layer.attention.attend(q, batch, pages[index], x)
            layer.mlp.add(ops.rms_norm(x, layer.post_norm, eps), x)
