"""What an EAGLE-3 head is made of, and which target it was made for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.config import ModelConfig
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity, read_section, section
from pdspec.types import CacheGroup

GROUP = "draft/eagle3"
# Variants of the architecture that some public heads set; refused until they are built, never approximated.
_UNSUPPORTED = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "bias", "attention_bias")


def default_fused_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers whose *inputs* are fused: 2, L//2, L-3 as SafeAILab's code has it; the last three of a toy target
    where these would coincide. Raises ConfigError below three layers."""
    if num_layers < 3:
        raise ConfigError(f"a target of {num_layers} layers has no three levels to fuse", field="model",
                          remedy="use drafter ngram or none")
    return (2, num_layers // 2, num_layers - 3) if num_layers >= 7 else (num_layers - 3, num_layers - 2, num_layers - 1)


@dataclass(frozen=True, kw_only=True)
class Eagle3Config:
    """Geometry of a head. ``hidden_size`` is the target's; ``fused_layers`` are target layers whose inputs it reads,
    in the order in which ``fc`` takes them. Ids of the reduced vocabulary are *draft ids*."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    fused_layers: tuple[int, ...]
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("hidden_size", "head_dim", "intermediate_size")}
        wrong = [f"{name}={size}" for name, size in sizes.items() if size < 16 or size % 16]
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            wrong.append(f"num_heads={self.num_heads} over num_kv_heads={self.num_kv_heads}")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            wrong.append(f"draft_vocab_size={self.draft_vocab_size} of vocab_size={self.vocab_size}")
        if len(set(self.fused_layers)) != len(self.fused_layers) or min(self.fused_layers, default=-1) < 0:
            wrong.append(f"fused_layers={self.fused_layers}")
        if wrong:
            raise CheckpointError(f"no EAGLE-3 head can have {', '.join(wrong)}", field="heads", remedy=HEAD_REMEDY)

    @classmethod
    def for_target(
        cls, target: ModelConfig, draft_vocab_size: int, *, intermediate_size: int = 0,
        fused_layers: tuple[int, ...] = (),
    ) -> Eagle3Config:
        """A head with the target's own attention geometry and RoPE (0 and () take the target's and the default)."""
        return cls(
            hidden_size=target.hidden_size, num_heads=target.num_heads, num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim, intermediate_size=intermediate_size or target.intermediate_size,
            vocab_size=target.vocab_size, draft_vocab_size=draft_vocab_size,
            fused_layers=fused_layers or default_fused_layers(target.num_layers), rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta, rope_scaling=target.rope_scaling,
        )

    def cache_group(self, dtype: str) -> CacheGroup:
        """Its KV rows: one layer, in ``dtype`` ("bfloat16" | "float32")."""
        return CacheGroup(
            name=GROUP, num_layers=1, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype=dtype
        )

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Its matrices [N, K] under SafeAILab's keys."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "fc.weight": (hidden, len(self.fused_layers) * hidden),
            "midlayer.self_attn.q_proj.weight": (q_rows, 2 * hidden),
            "midlayer.self_attn.k_proj.weight": (kv_rows, 2 * hidden),
            "midlayer.self_attn.v_proj.weight": (kv_rows, 2 * hidden),
            "midlayer.self_attn.o_proj.weight": (hidden, q_rows),
            "midlayer.mlp.gate_proj.weight": (inner, hidden),
            "midlayer.mlp.up_proj.weight": (inner, hidden),
            "midlayer.mlp.down_proj.weight": (hidden, inner),
            "lm_head.weight": (self.draft_vocab_size, hidden),
        }

    def norm_shapes(self) -> dict[str, tuple[int]]:
        """Its norms [H] under SafeAILab's keys."""
        names = ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm")
        return {f"{name}.weight": (self.hidden_size,) for name in names}


def head_json(config: Eagle3Config, target: TargetIdentity | None, card: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: the keys of SafeAILab's heads, ours under ``pdspec``."""
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu",
        "num_hidden_layers": 1, "hidden_size": config.hidden_size, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling, "tie_word_embeddings": False,
    }
    return {**values, "pdspec": section(target, card, fused_layers=list(config.fused_layers))}


def parse_head(
    values: Mapping[str, Any], where: Path, target_layers: int = 0
) -> tuple[Eagle3Config, TargetIdentity | None, dict[str, Any]]:
    """(config, target it was made for, card) out of ``config.json``.

    A head without our section (a public one) fuses the default layers of a target of ``target_layers``. Raises
    CheckpointError for a missing or senseless field, ConfigError for a variant that cannot be run.
    """
    ours = values.get("pdspec") or {}
    refused = [name for name in _UNSUPPORTED if values.get(name) or (values.get("eagle_config") or {}).get(name)]
    if not ours and (values.get("eagle_config") or values).get("eagle_aux_hidden_state_layer_ids"):
        refused.append("eagle_aux_hidden_state_layer_ids")  # engines disagree: inputs or outputs of these layers
    if refused:
        raise ConfigError(f"the head in {where} uses {', '.join(refused)}, which pdspec cannot run", field="heads",
                          remedy="choose a head of SafeAILab's EAGLE-3 architecture")
    target, card = read_section(values, where)
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        if int(values.get("num_hidden_layers", 1)) != 1 or int(values.get("target_hidden_size") or hidden) != hidden:
            raise ValueError("one layer as wide as the target is expected")
        config = Eagle3Config(
            hidden_size=hidden, num_heads=heads, num_kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            intermediate_size=int(values["intermediate_size"]), vocab_size=int(values["vocab_size"]),
            draft_vocab_size=int(values.get("draft_vocab_size") or values["vocab_size"]),
            fused_layers=tuple(int(n) for n in ours.get("fused_layers") or default_fused_layers(target_layers)),
            rms_norm_eps=float(values["rms_norm_eps"]), rope_theta=float(values.get("rope_theta") or 10000.0),
            rope_scaling=values.get("rope_scaling"),
        )
        return config, target, card
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json of the head in {where} is damaged: {error!r}", field="heads",
                              remedy=HEAD_REMEDY) from error
