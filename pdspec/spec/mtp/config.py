"""What MTP modules are made of, and which target they were made for. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.config import ModelConfig, latent_group
from pdspec.model.variants import Mla, Moe
from pdspec.spec.formats import settings
from pdspec.spec.geometry import LayerGeometry, parse_geometry, target_geometry
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity, read_section, section
from pdspec.spec.mtp.variants import parse_variants, variants_json
from pdspec.types import CacheGroup

FAMILY = "mtp"
# Layers of other kinds, by the config keys that say so; refused until they are built, never approximated.
_UNSUPPORTED = ("num_local_experts", "attention_bias", "mlp_bias", "quantization_config")
_MODULE_NORMS = ("enorm", "hnorm", "input_layernorm", "post_attention_layernorm", "shared_head.norm")


def group_name(module: int) -> str:
    """The cache group of module ``module`` = 1..N; groups count from 0."""
    return f"draft/mtp/{module - 1}"


@dataclass(frozen=True, kw_only=True)
class MtpConfig(LayerGeometry):
    """Geometry of ``num_modules`` modules, N; all alike. In the files module m is layer L+m-1, L = ``target_layers``:
    the modules continue the target's own layers."""

    num_modules: int
    target_layers: int
    mla: Mla | None = None  # with it, ``head_dim`` is that of queries and keys
    moe: Moe | None = None

    @property
    def is_plain(self) -> bool:
        """See ``LayerGeometry``."""
        return super().is_plain and self.mla is None and self.moe is None

    def wrong_fields(self) -> list[str]:
        """See ``LayerGeometry``."""
        wrong = super().wrong_fields()
        counts = {"num_nextn_predict_layers": self.num_modules, "num_hidden_layers": self.target_layers}
        wrong += [f"{name}={count}" for name, count in counts.items() if count < 1]
        for variant in (self.mla, self.moe):
            wrong += variant.wrong_fields() if variant else []
            wrong += [f"{name}={size}" for name, size in variant.kernel_sizes.items() if size % 16] if variant else []
        return wrong

    @classmethod
    def for_target(
        cls, target: ModelConfig, draft_vocab_size: int, num_modules: int, *, intermediate_size: int = 0
    ) -> MtpConfig:
        """Modules with the target's own layer geometry and RoPE (0: its intermediate size, too)."""
        return cls(
            **target_geometry(target, draft_vocab_size, intermediate_size), num_modules=num_modules,
            target_layers=target.num_layers,
        )

    def cache_group(self, module: int, dtype: str) -> CacheGroup:
        """KV rows of module 1..N: one layer, in ``dtype`` ("bfloat16" | "float32"), latent where the attention is."""
        if self.mla is not None:
            return latent_group(self.mla, group_name(module), 1, dtype)
        return self.layer_group(group_name(module), dtype)

    def prefix(self, module: int) -> str:
        """What the keys of module 1..N begin with."""
        return f"model.layers.{self.target_layers + module - 1}"

    def module_shapes(self, module: int) -> dict[str, tuple[int, ...]]:
        """Tensors of module 1..N under DeepSeek's keys: matrices [N, K] and norms [H]."""
        prefix, hidden = self.prefix(module), self.hidden_size
        attention, mlp = self.attention_shapes(prefix, hidden), self.mlp_shapes(f"{prefix}.mlp", self.intermediate_size)
        if self.mla is not None:
            attention = _below(prefix, self.mla.shapes(hidden, self.num_heads))
        if self.moe is not None:
            mlp = _below(prefix, self.moe.shapes(hidden))
        return {
            f"{prefix}.eh_proj.weight": (hidden, 2 * hidden), **attention, **mlp,
            **{f"{prefix}.{name}.weight": (hidden,) for name in _MODULE_NORMS},
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all modules."""
        modules = range(1, self.num_modules + 1)
        return {name: shape for module in modules for name, shape in self.module_shapes(module).items()}


def _below(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def head_json(config: MtpConfig, target: TargetIdentity | None, card: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: DeepSeek's names for the counts, Llama's for the layers, ours under ``pdspec``."""
    counts = {"num_hidden_layers": config.target_layers, "num_nextn_predict_layers": config.num_modules}
    variants = variants_json(config.mla, config.moe)
    values = {"architectures": ["DeepSeekMTPModel"], **config.layer_json(), **variants, **counts}
    return {**values, "pdspec": section(target, card)}


def parse_head(
    values: Mapping[str, Any], where: Path
) -> tuple[MtpConfig, TargetIdentity | None, dict[str, Any]]:
    """(config, target the modules were made for, card) out of ``config.json`` of any format, which may be a target's.
    Raises CheckpointError for a missing or senseless field, ConfigError for a variant that cannot be run."""
    values = settings(values, FAMILY, where)
    refused = [name for name in _UNSUPPORTED if values.get(name)]
    if values.get("sliding_window") and values.get("use_sliding_window", True):
        refused.append("sliding_window")
    if refused:
        raise ConfigError(f"the modules in {where} use {', '.join(refused)}, which pdspec cannot run", field="heads",
                          remedy="choose unquantised MTP modules with full attention and no other biases than q, k, v")
    target, card = read_section(values, where)
    try:
        mla, moe = parse_variants(values, where)
        geometry = parse_geometry({"intermediate_size": 16, **values, "num_hidden_layers": 1}, where)
        if mla is not None:  # the config's own head_dim and KV heads are of something else
            geometry |= {"head_dim": mla.nope_head_dim + mla.rope_head_dim, "num_kv_heads": geometry["num_heads"]}
        config = MtpConfig(
            **geometry, target_layers=int(values["num_hidden_layers"]), mla=mla, moe=moe,
            num_modules=int(values["num_nextn_predict_layers"]),
        )
        return config, target, card
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json of the modules in {where} is damaged: {error!r}", field="heads",
                              remedy=HEAD_REMEDY) from error
