"""The target's forward pass over one packed batch: ``ForwardBatch`` in, ``ForwardOutput`` out.

On a CPU all layers run inside one call into the kernels (the GIL is released meanwhile); elsewhere the same layers
are spelled out with ``Ops``. ``on_layer`` is called after each layer, which is when its KV rows can leave.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.model.config import ModelConfig
from pdspec.model.native import (
    CacheStruct,
    LayerStruct,
    ModelStruct,
    NativeOps,
    ScratchStruct,
    cache_struct,
    rows_struct,
)
from pdspec.model.ops import Ops, make_rope, norm_heads

OnLayer = Callable[[int], None]
OnQueries = Callable[[int, torch.Tensor], None]  # layer, q [R, heads, D] after RoPE, not scaled


@dataclass(frozen=True)
class Layer:
    """Packed weights of one decoder layer; norms and biases float32."""

    qkv: Any
    o: Any
    gate_up: Any
    down: Any
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class Runner:
    """A Llama-family decoder with packed weights. ``weights`` has Hugging Face keys, in ``dtype`` (KV rows are in
    ``dtype`` too); it is emptied while packing, so that no second copy stays in memory. ``group`` names the cache group
    of its KV rows."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], *, ops: Ops, dtype: str = "bfloat16",
        group: str = "target",
    ) -> None:
        self.config, self.ops, self.dtype = config, ops, dtype
        self.group = config.cache_group(group, dtype)
        self.rope = make_rope(
            head_dim=config.head_dim,
            theta=config.rope_theta,
            max_positions=config.max_context,
            scaling=config.rope_scaling,
            device=ops.device,
        )
        self.embedding = ops.pack(weights["model.embed_tokens.weight"])
        self.lm_head = self.embedding if config.tie_embeddings else ops.pack(weights.pop("lm_head.weight"))
        self.final_norm = weights.pop("model.norm.weight").float().to(ops.device)
        self.layers = [self._pack_layer(weights, i) for i in range(config.num_layers)]
        weights.clear()
        self._native = _NativeLayers(self) if isinstance(ops, NativeOps) else None

    def _pack_layer(self, weights: dict[str, torch.Tensor], index: int) -> Layer:
        prefix = f"model.layers.{index}."

        def take(name: str) -> torch.Tensor:
            return weights.pop(prefix + name)

        def norm(name: str) -> torch.Tensor:
            return take(name).float().to(self.ops.device)

        attention, config = "self_attn.", self.config
        qkv = self.ops.pack(torch.cat([take(f"{attention}{n}_proj.weight") for n in "qkv"]))
        bias = (
            torch.cat([take(f"{attention}{n}_proj.bias") for n in "qkv"]).float().to(self.ops.device)
            if config.qkv_bias
            else None
        )
        return Layer(
            qkv=qkv,
            o=self.ops.pack(take(attention + "o_proj.weight")),
            gate_up=self.ops.pack(torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])),
            down=self.ops.pack(take("mlp.down_proj.weight")),
            input_norm=norm("input_layernorm.weight"),
            post_norm=norm("post_attention_layernorm.weight"),
            qkv_bias=bias,
            q_norm=norm(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=norm(attention + "k_norm.weight") if config.qk_norm else None,
        )

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
            w = self.layers[index]
            qkv = ops.linear(ops.rms_norm(x, w.input_norm, eps), w.qkv, w.qkv_bias)
            if w.q_norm is not None and w.k_norm is not None:
                qkv = norm_heads(qkv, w.q_norm, w.k_norm, self.config.num_kv_heads, eps)
            q = ops.rope_store(qkv, self.rope, batch, pages[index])
            if on_queries is not None:
                on_queries(index, q)
            ops.linear(ops.attend(q, batch, pages[index]), w.o, out=x, add=True)
            gate_up = ops.linear(ops.rms_norm(x, w.post_norm, eps), w.gate_up)
            ops.linear(ops.silu_mul(gate_up), w.down, out=x, add=True)


class _NativeLayers:
    """The same layers in one kernel call. Holds the C view of the weights and a scratch that grows to the
    largest batch seen, so that steps allocate nothing."""

    def __init__(self, runner: Runner) -> None:
        config, ops = runner.config, runner.ops
        if not isinstance(ops, NativeOps):
            raise TypeError("native layers need native operations")
        _check_sizes(config)
        self.runner, self.ops = runner, ops
        self._layers = (LayerStruct * config.num_layers)(*map(_layer_struct, runner.layers))
        self._model = ModelStruct(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            int(runner.layers[0].qkv.bf16),
            config.rms_norm_eps,
            runner.rope.cos.data_ptr(),
            runner.rope.sin.data_ptr(),
            ctypes.cast(self._layers, ctypes.c_void_p),
        )
        self._caches: tuple[PagedCache, Any] | None = None
        self._rows = 0
        self._scratch: list[torch.Tensor] = []

    def _reserve(self, rows: int) -> ScratchStruct:
        if rows > self._rows:
            config = self.runner.config
            q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
            widths = (config.hidden_size, q + 2 * kv, q, 2 * config.intermediate_size, config.intermediate_size)
            self._scratch = [torch.empty(rows, width) for width in widths]
            self._rows = rows
        return ScratchStruct(*(t.data_ptr() for t in self._scratch))

    def _cache_structs(self, cache: PagedCache) -> Any:
        if self._caches is None or self._caches[0] is not cache:
            layers = cache.group(self.runner.group.name)
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


def _check_sizes(config: ModelConfig) -> None:
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
    }
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % 16]
    if config.head_dim > 256 or config.num_heads // config.num_kv_heads > 16:
        wrong.append(f"head_dim={config.head_dim}, {config.num_heads} heads over {config.num_kv_heads}")
    if wrong:
        raise ConfigError(
            f"the CPU kernels cannot run {', '.join(wrong)}",
            field="model",
            remedy="sizes are multiples of 16, head_dim at most 256, at most 16 query heads per KV head",
        )


def _layer_struct(layer: Layer) -> LayerStruct:
    optional = (layer.qkv_bias, layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
    packed = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return LayerStruct(*(p.data.data_ptr() for p in packed), *(None if t is None else t.data_ptr() for t in optional))
