"""What a decoder is made of: read once from ``config.json``, frozen, no torch.

Supported are decoders whose layer is *norm, attention with RoPE, norm, SwiGLU*, also with latent attention or experts
in their places (``variants.py``). What the runner cannot compute exactly
as the checkpoint's authors meant it (another activation, a bias it has no place for, an unknown RoPE rule) is refused
here, by name, rather than approximated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.variants import MOE_ARCHITECTURES, Mla, Moe, Shapes, mlp_shapes, parse_mla, parse_moe
from pdspec.types import CacheGroup

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MiMoForCausalLM",
    *MOE_ARCHITECTURES,
)  # fmt: skip
_QKV_BIAS = ("Qwen2ForCausalLM", "MiMoForCausalLM")  # biases of q, k and v, none of o
SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Geometry and constants of one decoder.

    ``max_context`` is in tokens, already capped by a sliding window (inside it, full attention is the same thing).
    ``rope_scaling`` is None or a dict with ``rope_type`` in ``SUPPORTED_ROPE``. ``dtype`` is the checkpoint's own.
    With ``mla`` the attention is latent: ``head_dim`` is then that of queries and keys. With ``moe`` some layers have
    experts, the others ``intermediate_size``.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    max_context: int
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    mla: Mla | None = None
    moe: Moe | None = None

    @property
    def rope_dim(self) -> int:
        """Values of a head that RoPE turns."""
        return self.mla.rope_head_dim if self.mla else self.head_dim

    def experts_of(self, layer: int) -> Moe | None:
        """The mixture of experts that ``layer`` is, if it is one. Layers behind the last are MTP modules: they are."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    def target_group(self, dtype: str) -> CacheGroup:
        """The cache group ``target`` of this decoder, with KV rows of ``dtype``."""
        return self.cache_group("target", dtype)

    def cache_group(self, name: str, dtype: str) -> CacheGroup:
        """The cache group ``name`` of this decoder's KV rows, in ``dtype``."""
        layers = self.num_layers
        if self.mla:
            return latent_group(self.mla, name, layers, dtype)
        return CacheGroup(
            name=name, num_layers=layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype=dtype
        )


def latent_group(mla: Mla, name: str, num_layers: int, dtype: str) -> CacheGroup:
    """Latent KV: for all heads one vector per token and layer, which is key and value."""
    return CacheGroup(
        name=name, num_layers=num_layers, num_kv_heads=1, head_dim=mla.row_dim, dtype=dtype, parts=1
    )


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of ``config`` must hold, under its Hugging Face key, in layer order."""
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(config, layer).items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_shapes(config: ModelConfig, layer: int) -> Shapes:
    """Every tensor of one layer, by the rest of its key, in the order of its use."""
    hidden, moe = config.hidden_size, config.experts_of(layer)
    attention = config.mla.shapes(hidden, config.num_heads) if config.mla else _attention_shapes(config)
    return {
        "input_layernorm.weight": (hidden,), **attention, "post_attention_layernorm.weight": (hidden,),
        **(moe.shapes(hidden) if moe else mlp_shapes("mlp", hidden, config.intermediate_size)),
    }


def _attention_shapes(config: ModelConfig) -> Shapes:
    hidden = config.hidden_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Shapes = {}
    for letter, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
        shapes[f"self_attn.{letter}_proj.weight"] = (rows, hidden)
        if config.qkv_bias:
            shapes[f"self_attn.{letter}_proj.bias"] = (rows,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    return {**shapes, "self_attn.o_proj.weight": (hidden, q_rows)}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError naming the file when it is absent or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}", field="model", remedy="fetch the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", field="model", remedy="fetch the checkpoint again")
    return value


def read_config(folder: Path, name: str) -> ModelConfig:
    """The ``ModelConfig`` of a checkpoint folder. Raises CheckpointError (unreadable) or ConfigError (unsupported)."""
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return parse_config(values, name, read_json(generation) if generation.exists() else {})


def parse_config(values: dict[str, Any], name: str, generation: dict[str, Any] | None = None) -> ModelConfig:
    """Reads Hugging Face ``config.json`` values, of transformers 4 or 5; end tokens of ``generation`` are added.

    Raises ConfigError naming the architecture or setting that cannot be served, CheckpointError on a missing field.
    """
    architecture = _architecture(values, name)
    _refuse_unsupported(values, name, architecture)
    rope = _rope(values, name)
    try:
        num_heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        mla = parse_mla(values, architecture)
        head_dim = mla.nope_head_dim + mla.rope_head_dim if mla else int(values.get("head_dim") or hidden // num_heads)
        config = ModelConfig(
            name=name,
            architecture=architecture,
            num_layers=int(values["num_hidden_layers"]),
            hidden_size=hidden,
            num_heads=num_heads,
            num_kv_heads=num_heads if mla else int(values.get("num_key_value_heads") or num_heads),
            head_dim=head_dim,
            intermediate_size=int(values["intermediate_size"]),
            vocab_size=int(values["vocab_size"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
            rope_theta=float(rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0),
            rope_scaling=rope or None,
            max_context=_max_context(values),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=architecture in _QKV_BIAS,
            qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            bos_ids=_ids(values.get("bos_token_id")),
            eos_ids=_merge(_ids((generation or {}).get("eos_token_id")), _ids(values.get("eos_token_id"))),
            dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
            mla=mla,
            moe=parse_moe(values, architecture, name),
        )
    except KeyError as error:
        raise CheckpointError(
            f"config.json of {name} lacks {error}", field="model", remedy="fetch the checkpoint again"
        ) from error
    _check_geometry(config)
    return config


def _architecture(values: dict[str, Any], name: str) -> str:
    named = values.get("architectures") or [values.get("model_type", "unnamed")]
    if named[0] not in SUPPORTED_ARCHITECTURES:
        raise ConfigError(
            f"{name} is a {named[0]}, which pdspec cannot run",
            field="model",
            remedy="choose a model whose architecture is one of " + ", ".join(SUPPORTED_ARCHITECTURES),
        )
    return str(named[0])


def _refuse_unsupported(values: dict[str, Any], name: str, architecture: str) -> None:
    refused = {
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "mlp_bias": bool(values.get("mlp_bias")),
        "attention_bias": bool(values.get("attention_bias")) and architecture not in _QKV_BIAS,
        "quantization_config": values.get("quantization_config") is not None,
    }
    for key, present in refused.items():
        if present:
            raise ConfigError(
                f"{name} sets {key} to {values.get(key)!r}, which pdspec cannot run",
                field="model",
                remedy="choose an unquantised checkpoint with SwiGLU layers and no attention output bias",
            )


def _rope(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The RoPE rule, empty for the default; may hold ``rope_theta`` (transformers 5 keeps both in one place)."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind not in SUPPORTED_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"{name} uses the RoPE rule {kind!r} with {rope}",
            field="model",
            remedy="choose a model whose rope_type is one of " + ", ".join(SUPPORTED_ROPE),
        )
    rope.pop("partial_rotary_factor", None)
    if kind == "yarn":  # transformers' defaults
        longest = int(values.get("max_position_embeddings") or 1)
        rope["original_max_position_embeddings"] = rope.get("original_max_position_embeddings") or longest
        rope["factor"] = rope.get("factor") or longest / rope["original_max_position_embeddings"]
    if kind == "default":
        return {key: value for key, value in rope.items() if key == "rope_theta"}
    return {"rope_type": kind, **rope}


def _max_context(values: dict[str, Any]) -> int:
    """Positions the model knows; a sliding window caps it, because inside the window attention is full attention."""
    limit, window = int(values["max_position_embeddings"]), values.get("sliding_window")
    layer_types = values.get("layer_types")
    sliding = "sliding_attention" in layer_types if layer_types else values.get("use_sliding_window", True)
    return min(limit, int(window)) if window and sliding else limit


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(one) for one in value) if isinstance(value, (list, tuple)) else (int(value),)


def _merge(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(first + second))


def _check_geometry(config: ModelConfig) -> None:
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")
    wrong = [f"{size}={getattr(config, size)}" for size in sizes if getattr(config, size) < 1]
    if config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads:
        wrong.append(f"num_heads={config.num_heads} is no multiple of num_kv_heads={config.num_kv_heads}")
    if config.head_dim % 2:
        wrong.append(f"head_dim={config.head_dim} is odd")
    for variant in (config.mla, config.moe):
        wrong += variant.wrong_fields() if variant else []
    if config.dtype not in DTYPES:
        wrong.append(f"dtype={config.dtype}")
    wrong += [f"end token {one} outside the vocabulary" for one in config.eos_ids if not 0 <= one < config.vocab_size]
    if wrong:
        raise CheckpointError(
            f"config.json of {config.name} makes no sense: {', '.join(wrong)}",
            field="model",
            remedy="fetch the checkpoint again",
        )
