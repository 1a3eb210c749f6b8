"""Runs of ordinary decoder layers inside one call into the CPU kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.model.config import ModelConfig
from pdspec.model.layers import Attention, Layer, Mlp
from pdspec.model.native import (
    MAX_DIM,
    MAX_GROUP,
    CacheStruct,
    LayerStruct,
    ModelStruct,
    NativeOps,
    ScratchStruct,
    cache_struct,
    rows_struct,
)
from pdspec.model.ops import Rope


class NativeLayers:
    """Layers that are all ``Attention`` and ``Mlp``, in one kernel call. Holds the C view of the weights and a scratch
    that grows to the largest batch seen, so that steps allocate nothing."""

    def __init__(
        self, config: ModelConfig, layers: Sequence[Layer], ops: NativeOps, rope: Rope, group: str, *, bf16: bool
    ) -> None:
        self.config, self.ops, self._group = config, ops, group
        self._kept = layers, rope  # the structs point into them
        self._layers = (LayerStruct * config.num_layers)(*map(_layer_struct, layers))
        self._model = ModelStruct(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            int(bf16),
            config.rms_norm_eps,
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
            ctypes.cast(self._layers, ctypes.c_void_p),
        )
        self._caches: tuple[PagedCache, Any] | None = None
        self._rows = 0
        self._scratch: list[torch.Tensor] = []

    def _reserve(self, rows: int) -> ScratchStruct:
        if rows > self._rows:
            config = self.config
            q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            widths = (config.hidden_size, q + 2 * kv, q, 2 * config.intermediate_size, config.intermediate_size)
            self._scratch = [torch.empty(rows, width) for width in widths]
            self._rows = rows
        return ScratchStruct(*(t.data_ptr() for t in self._scratch))

    def _cache_structs(self, cache: PagedCache) -> Any:
        if self._caches is None or self._caches[0] is not cache:
            layers = cache.group(self._group)
            self._caches = cache, (CacheStruct * len(layers))(*map(cache_struct, layers))
        return self._caches[1]

    def __call__(self, batch: ForwardBatch, cache: PagedCache, x: torch.Tensor, first: int, last: int) -> None:
        if first == last:
            return
        rows, scratch = rows_struct(batch), self._reserve(batch.num_rows)
        status = self.ops.lib.pd_layers(
            self.ops.pool,
            ctypes.byref(self._model),
            ctypes.byref(rows),
            self._cache_structs(cache),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.byref(scratch),
            first,
            last,
        )
        if status:
            raise MemoryError("attention scores")


def check_sizes(config: ModelConfig) -> None:
    """Raises ConfigError where the CPU kernels cannot run ``config``."""
    mla, moe = config.mla, config.moe
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    sizes |= mla.kernel_sizes if mla else {"head_dim": config.head_dim}
    sizes |= moe.kernel_sizes if moe else {}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % 16]
    if mla and mla.row_dim > MAX_DIM:
        wrong.append(f"latent rows of {mla.row_dim}")
    if not mla and (config.head_dim > 256 or config.num_heads // config.num_kv_heads > MAX_GROUP):
        wrong.append(f"head_dim={config.head_dim}, {config.num_heads} heads over {config.num_kv_heads}")
    if wrong:
        raise ConfigError(
            f"the CPU kernels cannot run {', '.join(wrong)}",
            field="model",
            remedy="sizes are multiples of 16, head_dim at most 256, at most 16 query heads per KV head, latent rows of"
            f" at most {MAX_DIM}",
        )


def _layer_struct(layer: Layer) -> LayerStruct:
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(attention, Attention) or not isinstance(mlp, Mlp):
        raise TypeError("latent attention and experts are spelled out")
    optional = (attention.bias, layer.input_norm, layer.post_norm, attention.q_norm, attention.k_norm)
    packed = (attention.qkv, attention.o, mlp.gate_up, mlp.down)
    return LayerStruct(*(p.data.data_ptr() for p in packed), *(None if t is None else t.data_ptr() for t in optional))
