"""What an EAGLE-1 head is made of, and which target it was made for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.config import ModelConfig
from pdspec.spec.formats import settings
from pdspec.spec.geometry import LayerGeometry, parse_geometry, target_geometry
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity, read_section, section

FAMILY = "eagle1"
# Of o_proj and the MLP; refused until they are built.
_UNSUPPORTED = ("attention_bias", "mlp_bias")


@dataclass(frozen=True, kw_only=True)
class Eagle1Config(LayerGeometry):
    """Geometry of a head. ``bias``: of ``fc``. The draft vocabulary is a choice of the target's ids; public heads draft
    all of them."""

    bias: bool = True

    @classmethod
    def for_target(
        cls, target: ModelConfig, draft_vocab_size: int, *, intermediate_size: int = 0, bias: bool = True
    ) -> Eagle1Config:
        """A head with the target's own attention geometry and RoPE (0: its intermediate size, too)."""
        return cls(**target_geometry(target, draft_vocab_size, intermediate_size), bias=bias)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its tensors under SafeAILab's keys; matrices are [N, K]."""
        hidden = self.hidden_size
        biases: dict[str, tuple[int, ...]] = {"fc.bias": (hidden,)} if self.bias else {}
        return {
            "fc.weight": (hidden, 2 * hidden), **self.layer_shapes("layers.0", hidden),
            "layers.0.post_attention_layernorm.weight": (hidden,), **biases,
        }


def head_json(config: Eagle1Config, target: TargetIdentity | None, card: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: the keys of SafeAILab's heads, ours under ``pdspec``."""
    values = {"architectures": ["LlamaForCausalLMEagle"], **config.layer_json(), "bias": config.bias}
    return {**values, "pdspec": section(target, card)}


def parse_head(
    values: Mapping[str, Any], where: Path
) -> tuple[Eagle1Config, TargetIdentity | None, dict[str, Any]]:
    """(config, target it was made for, card) out of ``config.json`` of any format; without the key ``bias`` there is
    one, as in SafeAILab's code. Raises CheckpointError for a missing or senseless field, ConfigError for a variant that
    cannot be run."""
    values = settings(values, FAMILY, where)
    if refused := [name for name in _UNSUPPORTED if values.get(name)]:
        raise ConfigError(f"the head in {where} uses {', '.join(refused)}, which pdspec cannot run", field="heads",
                          remedy="choose a head of SafeAILab's EAGLE-1 architecture")
    target, card = read_section(values, where)
    try:
        return Eagle1Config(**parse_geometry(values, where), bias=bool(values.get("bias", True))), target, card
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json of the head in {where} is damaged: {error!r}", field="heads",
                              remedy=HEAD_REMEDY) from error
