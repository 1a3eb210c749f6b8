"""The target's forward pass over one packed batch: ``ForwardBatch`` in, ``ForwardOutput`` out.

On a CPU layers of Llama's kind all run inside one call into the kernels (the GIL is released meanwhile); others, and
elsewhere all, are spelled out with ``Ops``. ``on_layer`` is called after each layer: then its KV rows can leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import DTYPES, PagedCache
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.model.config import ModelConfig
from pdspec.model.layers import Layer, LayerTensors, make_layer
from pdspec.model.native import NativeOps
from pdspec.model.native_layers import NativeLayers, check_sizes
from pdspec.model.ops import Ops, Rope, make_rope

OnLayer = Callable[[int], None]
OnQueries = Callable[[int, torch.Tensor], None]  # layer, q [R, heads, D] after RoPE, not divided by the root of D
RunLayers = Callable[[ForwardBatch, PagedCache, torch.Tensor, int, int], None]  # layers first .. last-1, over x


class Runner:
    """A decoder with packed weights. ``weights`` has Hugging Face keys, in ``dtype`` (KV rows are in ``dtype`` too); it
    is emptied while packing, so that no second copy stays in memory. ``group`` names the cache group of its KV rows.
    ``embedding`` and ``lm_head`` (some rows suffice) are another model's, packed by the same ``ops``; without them
    those in ``weights`` serve."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], *, ops: Ops, dtype: str = "bfloat16",
        group: str = "target", embedding: Any = None, lm_head: Any = None,
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
        self.embedding = ops.pack(weights["model.embed_tokens.weight"]) if embedding is None else embedding
        self.lm_head = self._output_rows(weights) if lm_head is None else lm_head
        self.final_norm = weights.pop("model.norm.weight").float().to(ops.device)
        self.layers: list[Layer] = []
        self._run = self._load_layers(weights)
        weights.clear()

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
        run = self._run if on_queries is None else partial(self._spelled_out, on_queries=on_queries)
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

    def _output_rows(self, weights: dict[str, torch.Tensor]) -> Any:
        return self.embedding if self.config.tie_embeddings else self.ops.pack(weights.pop("lm_head.weight"))

    def _load_layers(self, weights: dict[str, torch.Tensor]) -> RunLayers:
        """Pack the layers; what runs them."""
        self.layers = make_layers(self.config, weights, self.ops, self.rope, self.dtype)
        if isinstance(self.ops, NativeOps) and self.config.mla is None and self.config.moe is None:
            bf16 = DTYPES[self.dtype] == torch.bfloat16
            return NativeLayers(self.config, self.layers, self.ops, self.rope, self.group.name, bf16=bf16)
        return self._spelled_out

    def _spelled_out(
        self, batch: ForwardBatch, cache: PagedCache, x: torch.Tensor, first: int, last: int,
        on_queries: OnQueries | None = None,
    ) -> None:
        seen = None if on_queries is None else lambda index, q: on_queries(first + index, q)
        pages = cache.group(self.group.name)[first:last]
        run_layers(self.layers[first:last], self.ops, self.config.rms_norm_eps, batch, pages, x, on_queries=seen)


def make_layers(
    config: ModelConfig, weights: dict[str, torch.Tensor], ops: Ops, rope: Rope, dtype: str
) -> list[Layer]:
    """All layers of ``config``, their tensors taken out of ``weights``."""
    return [
        make_layer(config, index, LayerTensors(weights, f"model.layers.{index}", ops, DTYPES[dtype]), rope)
        for index in range(config.num_layers)
    ]


def run_layers(
    layers: Sequence[Layer], ops: Ops, eps: float, batch: ForwardBatch, pages: torch.Tensor, x: torch.Tensor, *,
    on_queries: OnQueries | None = None, add_up: Callable[[torch.Tensor], None] | None = None,
) -> None:  # fmt: skip
    """Layers over x [R, H], in place; ``pages`` has one entry for each. ``add_up`` makes the whole of a rank's partial
    sum [R, H], where layers are shared out among ranks."""

    def add(step: Callable[[torch.Tensor], None]) -> None:
        if add_up is None:
            step(x)
            return
        partial_sum = torch.zeros_like(x)
        step(partial_sum)
        add_up(partial_sum)
        x.add_(partial_sum)

    for index, layer in enumerate(layers):
        q = layer.attention.store(ops.rms_norm(x, layer.input_norm, eps), batch, pages[index])
        if on_queries is not None:
            on_queries(index, q)
        add(partial(layer.attention.attend, q, batch, pages[index]))
        add(partial(layer.mlp.add, ops.rms_norm(x, layer.post_norm, eps)))
