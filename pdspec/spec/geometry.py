"""The geometry that heads of one decoder layer share (EAGLE-1, EAGLE-3), and its keys in ``config.json``. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.config import SUPPORTED_ROPE, ModelConfig
from pdspec.spec.heads import HEAD_REMEDY
from pdspec.types import CacheGroup

_FLAGS = ("qkv_bias", "qk_norm", "output_gate")


@dataclass(frozen=True, kw_only=True)
class LayerGeometry:
    """``hidden_size`` is the target's; ids of the reduced vocabulary are *draft ids*. Raises CheckpointError for what
    no layer can have.

    What published layers have beyond Llama's: ``qkv_bias`` (Qwen2); ``qk_norm``, q and k normed head by head (Qwen3);
    ``output_gate``, attention times the sigmoid of a gate whose rows stand behind each head's in q_proj, and
    ``rotary_dim``, RoPE on the first values of a head alone, 0: all (Qwen3-Next)."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    output_gate: bool = False
    rotary_dim: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the layer is Llama's, with nothing beyond."""
        return not (self.qkv_bias or self.qk_norm or self.output_gate or self.rotary_dim)

    def __post_init__(self) -> None:
        if wrong := self.wrong_fields():
            raise CheckpointError(f"no head can have {', '.join(wrong)}", field="heads", remedy=HEAD_REMEDY)

    def wrong_fields(self) -> list[str]:
        """What cannot be, as ``field=value``."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "head_dim", "intermediate_size")}
        wrong = [f"{name}={size}" for name, size in sizes.items() if size < 16 or size % 16]
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            wrong.append(f"num_heads={self.num_heads} over num_kv_heads={self.num_kv_heads}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim < max(1, self.head_dim):
            wrong.append(f"rotary_dim={self.rotary_dim} of head_dim={self.head_dim}")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            wrong.append(f"draft_vocab_size={self.draft_vocab_size} of vocab_size={self.vocab_size}")
        return wrong

    def layer_group(self, name: str, dtype: str) -> CacheGroup:
        """KV rows of one layer, in ``dtype`` ("bfloat16" | "float32")."""
        return CacheGroup(
            name=name, num_layers=1, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype=dtype
        )

    def layer_shapes(self, prefix: str, inputs: int) -> dict[str, tuple[int, ...]]:
        """Tensors of a decoder layer whose attention reads rows of ``inputs`` values, without the layer's norms;
        matrices are [N, K]."""
        return {**self.attention_shapes(prefix, inputs), **self.mlp_shapes(f"{prefix}.mlp", self.intermediate_size)}

    def attention_shapes(self, prefix: str, inputs: int) -> dict[str, tuple[int, ...]]:
        """Of its attention."""
        rows = {"q": self.num_heads * self.head_dim, **dict.fromkeys("kv", self.num_kv_heads * self.head_dim)}
        shapes: dict[str, tuple[int, ...]] = {}
        for letter, count in rows.items():
            stored = 2 * count if letter == "q" and self.output_gate else count
            shapes[f"{prefix}.self_attn.{letter}_proj.weight"] = (stored, inputs)
            if self.qkv_bias:
                shapes[f"{prefix}.self_attn.{letter}_proj.bias"] = (stored,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (self.hidden_size, rows["q"])
        for letter in "qk" if self.qk_norm else "":
            shapes[f"{prefix}.self_attn.{letter}_norm.weight"] = (self.head_dim,)
        return shapes

    def mlp_shapes(self, prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        """Of a SwiGLU of ``inner`` values."""
        hidden = self.hidden_size
        return {
            f"{prefix}.gate_proj.weight": (inner, hidden), f"{prefix}.up_proj.weight": (inner, hidden),
            f"{prefix}.down_proj.weight": (hidden, inner),
        }

    def layer_json(self) -> dict[str, Any]:
        """Its keys in ``config.json``, as Llama configs have them, and what it has beyond Llama's under the keys that
        ``parse_geometry`` reads."""
        more: dict[str, Any] = {name: True for name in _FLAGS if getattr(self, name)}
        if self.rotary_dim:
            more["partial_rotary_factor"] = self.rotary_dim / self.head_dim
        return {
            "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1, "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads, "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim, "intermediate_size": self.intermediate_size, "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size, "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling, "tie_word_embeddings": False,
            **more,
        }


def target_geometry(target: ModelConfig, draft_vocab_size: int, intermediate_size: int = 0) -> dict[str, Any]:
    """Fields of a ``LayerGeometry`` with the target's own attention and RoPE (0: its intermediate size, too)."""
    return {
        "hidden_size": target.hidden_size, "num_heads": target.num_heads, "num_kv_heads": target.num_kv_heads,
        "head_dim": target.head_dim, "intermediate_size": intermediate_size or target.intermediate_size,
        "vocab_size": target.vocab_size, "draft_vocab_size": draft_vocab_size, "rms_norm_eps": target.rms_norm_eps,
        "rope_theta": target.rope_theta, "rope_scaling": target.rope_scaling,
    }


def parse_geometry(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The same fields out of ``config.json``. Raises KeyError, TypeError or ValueError for one that is missing or
    senseless, ConfigError for a RoPE rule that is not built."""
    heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
    if int(values.get("num_hidden_layers", 1)) != 1 or int(values.get("target_hidden_size") or hidden) != hidden:
        raise ValueError("one layer as wide as the target is expected")
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta, older = rope.pop("rope_theta", None), rope.pop("type", None)
    head_dim = int(values.get("head_dim") or hidden // heads)
    partial = float(rope.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0)
    kind = rope.pop("rope_type", None) or older or "default"
    if kind not in SUPPORTED_ROPE:
        raise ConfigError(f"the head in {where} uses the RoPE rule {kind!r}", field="heads",
                          remedy="choose a head whose rope_type is one of " + ", ".join(SUPPORTED_ROPE))
    return {
        "hidden_size": hidden, "num_heads": heads, "num_kv_heads": int(values.get("num_key_value_heads") or heads),
        "head_dim": head_dim, "intermediate_size": int(values["intermediate_size"]),
        "vocab_size": int(values["vocab_size"]),
        "draft_vocab_size": int(values.get("draft_vocab_size") or values["vocab_size"]),
        "rms_norm_eps": float(values["rms_norm_eps"]),
        "rope_theta": float(theta or values.get("rope_theta") or 10000.0),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope},
        "rotary_dim": 0 if partial == 1.0 else round(head_dim * partial),
        **{name: bool(values.get(name)) for name in _FLAGS},
    }
