"""What an EAGLE-3 head is made of, and which target it was made for. No torch."""

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
from pdspec.types import CacheGroup

FAMILY = "eagle3"
GROUP = "draft/eagle3"
# Variants of the architecture that are refused until they are built, never approximated.
_UNSUPPORTED = ("bias", "attention_bias", "mlp_bias")
# Of EAGLE-3.1, of speculators, and ours
_FLAGS = ("fc_norm", "norm_output", "norm_before_residual", "norm_before_fc", "tied_output")


def default_fused_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers whose *inputs* are fused: 2, L//2, L-3 as SafeAILab's code has it; the last three of a toy target
    where these would coincide. Raises ConfigError below three layers."""
    if num_layers < 3:
        raise ConfigError(f"a target of {num_layers} layers has no three levels to fuse", field="model",
                          remedy="use drafter ngram or none")
    return (2, num_layers // 2, num_layers - 3) if num_layers >= 7 else (num_layers - 3, num_layers - 2, num_layers - 1)


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(LayerGeometry):
    """Geometry of a head. ``fused_layers`` are target layers whose inputs it reads, in the order in which ``fc`` takes
    them. EAGLE-3.1 (2605.09992): ``fc_norm``, each level is normed before ``fc``; ``norm_output``, the normed output of
    a row is the feature of the next one, and what ``lm_head`` reads. speculators: ``norm_before_residual``, the
    residual is the feature after its norm; ``norm_before_fc``, all levels are normed as one row. With ``tied_output``
    the head has no ``lm_head``: the target's output rows of its draft ids serve."""

    fused_layers: tuple[int, ...]
    fc_norm: bool = False
    norm_output: bool = False
    tied_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False

    @property
    def is_plain(self) -> bool:
        """See ``LayerGeometry``; those of EAGLE-3.1 are at home here."""
        return super().is_plain and not (self.norm_before_residual or self.norm_before_fc)

    def wrong_fields(self) -> list[str]:
        """See ``LayerGeometry``."""
        wrong = super().wrong_fields()
        if len(set(self.fused_layers)) != len(self.fused_layers) or min(self.fused_layers, default=-1) < 0:
            wrong.append(f"fused_layers={self.fused_layers}")
        if self.fc_norm and self.norm_before_fc:
            wrong.append("fc_norm with norm_before_fc")
        return wrong

    @classmethod
    def for_target(
        cls, target: ModelConfig, draft_vocab_size: int, *, intermediate_size: int = 0,
        fused_layers: tuple[int, ...] = (), fc_norm: bool = False, norm_output: bool = False, tied_output: bool = False,
    ) -> Eagle3Config:
        """A head with the target's own attention geometry and RoPE (0 and () take the target's and the default)."""
        return cls(
            **target_geometry(target, draft_vocab_size, intermediate_size), fc_norm=fc_norm, norm_output=norm_output,
            tied_output=tied_output, fused_layers=fused_layers or default_fused_layers(target.num_layers),
        )

    def cache_group(self, dtype: str) -> CacheGroup:
        """Its KV rows: one layer, in ``dtype`` ("bfloat16" | "float32")."""
        return self.layer_group(GROUP, dtype)

    def matrix_shapes(self) -> dict[str, tuple[int, ...]]:
        """``fc``, the layer and ``lm_head`` under SafeAILab's keys; matrices are [N, K]."""
        output = {} if self.tied_output else {"lm_head.weight": (self.draft_vocab_size, self.hidden_size)}
        return {
            "fc.weight": (self.hidden_size, len(self.fused_layers) * self.hidden_size),
            **self.layer_shapes("midlayer", 2 * self.hidden_size), **output,
        }

    def norm_shapes(self) -> dict[str, tuple[int, ...]]:
        """Its norms [H] under SafeAILab's keys; those of ``fc_norm`` under vLLM's, by level; speculators'
        ``input_norm`` of all levels."""
        names = ["midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm"]
        if self.fc_norm:
            names += [f"fc_norm.{level}" for level in range(len(self.fused_layers))]
        levels = {"input_norm.weight": (len(self.fused_layers) * self.hidden_size,)} if self.norm_before_fc else {}
        return {**{f"{name}.weight": (self.hidden_size,) for name in names}, **levels}


def head_json(config: Eagle3Config, target: TargetIdentity | None, card: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: the keys of SafeAILab's heads, ours under ``pdspec``."""
    values = {"architectures": ["LlamaForCausalLMEagle3"], **config.layer_json()}
    flags = {name: True for name in _FLAGS if getattr(config, name)}
    return {**values, **flags, "pdspec": section(target, card, fused_layers=list(config.fused_layers))}


def parse_head(
    values: Mapping[str, Any], where: Path, target_layers: int = 0
) -> tuple[Eagle3Config, TargetIdentity | None, dict[str, Any]]:
    """(config, target it was made for, card) out of ``config.json``.

    A head that names no layers to fuse takes the default ones of a target of ``target_layers``. Raises CheckpointError
    for a missing or senseless field, ConfigError for a variant that cannot be run.
    """
    values = settings(values, FAMILY, where)
    if refused := [name for name in _UNSUPPORTED if values.get(name)]:
        raise ConfigError(f"the head in {where} uses {', '.join(refused)}, which pdspec cannot run", field="heads",
                          remedy="choose a head of SafeAILab's EAGLE-3 architecture")
    target, card = read_section(values, where)
    try:
        fused = tuple(int(n) for n in values.get("fused_layers") or default_fused_layers(target_layers))
        flags: dict[str, Any] = {name: bool(values.get(name)) for name in _FLAGS}
        return Eagle3Config(**parse_geometry(values, where), fused_layers=fused, **flags), target, card
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json of the head in {where} is damaged: {error!r}", field="heads",
                              remedy=HEAD_REMEDY) from error
