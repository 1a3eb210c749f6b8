"""Shapes of well-known decoders, and what a forward of any decoder reads and computes. No weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from pdspec.errors import PdspecError
from pdspec.model.config import ModelConfig, layer_shapes, parse_config, read_config
from pdspec.model.hub import locate
from pdspec.settings import unknown_name

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float8": 1, "int4": 0.5}  # of a weight


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner,
        "vocab_size": vocab, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **more,
    }  # fmt: skip


_QWEN3: dict[str, Any] = {"head_dim": 128, "max_position_embeddings": 40960}
_DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "moe_layer_freq": 1, "max_position_embeddings": 163840,
}  # fmt: skip
# The values of each one's published config.json that decide its cost.
KNOWN: dict[str, dict[str, Any]] = {
    "llama-68m": _llama(2, 768, 12, 12, 3072, 32000),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13824, 32000),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, tie_word_embeddings=True, head_dim=64),
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, max_position_embeddings=131072),
    "llama-3.1-70b": _llama(80, 8192, 64, 8, 28672, 128256, max_position_embeddings=131072),
    "qwen3-0.6b": _llama(28, 1024, 16, 8, 3072, 151936, tie_word_embeddings=True, **_QWEN3),
    "qwen3-8b": _llama(36, 4096, 32, 8, 12288, 151936, **_QWEN3),
    "qwen3-32b": _llama(64, 5120, 64, 8, 25600, 151936, **_QWEN3),
    "qwen3-30b-a3b": _llama(48, 2048, 32, 4, 6144, 151936, **_QWEN3) | {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    },
    "mixtral-8x7b": _llama(32, 4096, 32, 8, 14336, 32000) | {
        "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "deepseek-v3": _llama(61, 7168, 128, 128, 18432, 129280) | _DEEPSEEK_V3,
    "smollm2-135m": _llama(30, 576, 9, 3, 1536, 49152, tie_word_embeddings=True),
}  # fmt: skip


def model_shape(name: str) -> ModelConfig:
    """A known decoder, or that of a folder with config.json, or of a model that is in the cache. Raises ConfigError."""
    if name in KNOWN:
        return parse_config(KNOWN[name], name)
    if Path(name).is_dir():
        return read_config(Path(name), name)
    try:
        located = locate(name, weights=False)
    except PdspecError as error:
        raise unknown_name("model", name, tuple(KNOWN), field="--model", where="the table") from error
    if located.path is None:
        raise unknown_name("model", name, tuple(KNOWN), field="--model", where="the table")
    return read_config(located.path, name)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder in a number format. ``kv_dtype`` is that of KV rows."""

    config: ModelConfig
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    @property
    def weight_size(self) -> float:
        """Bytes of one weight."""
        return BYTES[self.dtype]

    @cached_property
    def _layers(self) -> tuple[float, float, int]:
        """(weights outside of experts, weights of all routed experts, experts of a layer), all layers together."""
        dense = routed = 0.0
        experts = 0
        kinds: dict[bool, tuple[float, float]] = {}
        for layer in range(self.config.num_layers):
            moe = self.config.experts_of(layer)
            if (moe is not None) not in kinds:
                shapes = layer_shapes(self.config, layer)
                own = {name: prod(shape) for name, shape in shapes.items()}
                inside = sum(size for name, size in own.items() if ".experts." in name)
                kinds[moe is not None] = float(sum(own.values()) - inside), float(inside)
            outside, own_experts = kinds[moe is not None]
            dense, routed, experts = dense + outside, routed + own_experts, max(experts, moe.num_experts if moe else 0)
        return dense, routed, experts

    @property
    def weights(self) -> float:
        """All of them, tied ones once."""
        dense, routed, _ = self._layers
        tables = 1 if self.config.tie_embeddings else 2
        return dense + routed + (tables * self.config.vocab_size + 1) * self.config.hidden_size

    @property
    def weight_bytes(self) -> float:
        """Of all weights."""
        return self.weights * self.weight_size

    @property
    def head_weights(self) -> float:
        """Of the output matrix, which every forward reads whole; of the embedding it reads one row a token."""
        return float(self.config.vocab_size * self.config.hidden_size)

    def read_bytes(self, rows: int) -> float:
        """Of weights that a forward of ``rows`` rows reads. Of E experts, rows that choose k each touch
        E · (1 − (1 − k/E)^rows) on average, if they choose alike and apart from each other."""
        dense, routed, experts = self._layers
        share = 1.0
        if experts and self.config.moe:
            share = 1.0 - (1.0 - self.config.moe.experts_per_token / experts) ** rows
        return (dense + routed * share + self.head_weights) * self.weight_size

    @property
    def active_weights(self) -> float:
        """That one token passes."""
        dense, routed, experts = self._layers
        moe = self.config.moe
        return dense + (routed * moe.experts_per_token / experts if moe and experts else 0.0) + self.head_weights

    def flops(self, rows: float, context: float) -> float:
        """Of a forward of ``rows`` rows that each attend to ``context`` keys."""
        config = self.config
        width = config.mla.row_dim * 2 if config.mla else config.head_dim * 2  # scores and values of one head and key
        return 2.0 * rows * (self.active_weights + config.num_layers * config.num_heads * width * context)

    @property
    def kv_bytes(self) -> float:
        """Of one token's KV rows, of all layers: 2 · heads · dim of each (GQA: KV heads alone; MLA: one latent row)."""
        group = self.config.target_group("bfloat16")
        return group.row_bytes * group.num_layers * BYTES[self.kv_dtype] / 2

    def with_layers(self, count: int) -> Shape:
        """The same with fewer or more layers (of the last one's kind): the costs of a draft head."""
        moe = self.config.moe
        dense = tuple(range(count - 1)) if moe and moe.dense_layers else ()
        config = replace(self.config, num_layers=count, moe=replace(moe, dense_layers=dense) if moe else None)
        return replace(self, config=config)
