"""What Medusa heads are made of, and which target they were made for. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError
from pdspec.model.config import ModelConfig
from pdspec.spec.heads import HEAD_REMEDY, TargetIdentity, read_section, section

FAMILY = "medusa"
MAX_HEADS, MAX_LAYERS = 64, 16


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """Geometry of K = ``num_heads`` heads of ``num_layers`` residual blocks each. ``own_lm_heads``: each has an output
    matrix of its own, as published heads do; otherwise all share the target's lm_head rows of the draft vocabulary.
    Ids of the reduced vocabulary are *draft ids*."""

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    num_heads: int
    num_layers: int = 1
    own_lm_heads: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if self.hidden_size < 16 or self.hidden_size % 16:
            wrong.append(f"hidden_size={self.hidden_size}")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            wrong.append(f"draft_vocab_size={self.draft_vocab_size} of vocab_size={self.vocab_size}")
        if not 1 <= self.num_heads <= MAX_HEADS:
            wrong.append(f"medusa_num_heads={self.num_heads}")
        if not 0 <= self.num_layers <= MAX_LAYERS:
            wrong.append(f"medusa_num_layers={self.num_layers}")
        if wrong:
            raise CheckpointError(f"no Medusa heads can have {', '.join(wrong)}", field="heads", remedy=HEAD_REMEDY)

    @classmethod
    def for_target(
        cls, target: ModelConfig, draft_vocab_size: int, *, num_heads: int = 4, num_layers: int = 1
    ) -> MedusaConfig:
        """Heads over the target's own output rows."""
        return cls(
            hidden_size=target.hidden_size, vocab_size=target.vocab_size, draft_vocab_size=draft_vocab_size,
            num_heads=num_heads, num_layers=num_layers,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its tensors under Medusa's keys: head.block.linear, and head.(number of blocks).weight, the output."""
        hidden, shapes = self.hidden_size, dict[str, tuple[int, ...]]()
        for head in range(self.num_heads):
            for block in range(self.num_layers):
                shapes[f"{head}.{block}.linear.weight"] = (hidden, hidden)
                shapes[f"{head}.{block}.linear.bias"] = (hidden,)
            if self.own_lm_heads:
                shapes[f"{head}.{self.num_layers}.weight"] = (self.draft_vocab_size, hidden)
        return shapes


def head_json(config: MedusaConfig, target: TargetIdentity | None, card: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: the keys of published heads, the rest under ``pdspec``."""
    values = {
        "architectures": ["MedusaModel"], "medusa_num_heads": config.num_heads, "medusa_num_layers": config.num_layers,
        "hidden_size": config.hidden_size, "vocab_size": config.vocab_size, "draft_vocab_size": config.draft_vocab_size,
    }
    return {**values, "pdspec": section(target, card, own_lm_heads=config.own_lm_heads)}


def parse_head(
    values: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]], where: Path
) -> tuple[MedusaConfig, TargetIdentity | None, dict[str, Any]]:
    """(config, target it was made for, card) out of ``config.json`` and the shapes of what is ``stored``.

    The config of published heads tells less than their tensors do, and at times another number of heads: without our
    section the tensors count. Raises CheckpointError for a missing or senseless field.
    """
    target, card = read_section(values, where)
    ours = values.get("pdspec")
    try:
        if ours:
            config = MedusaConfig(
                hidden_size=int(values["hidden_size"]), vocab_size=int(values["vocab_size"]),
                draft_vocab_size=int(values["draft_vocab_size"]), num_heads=int(values["medusa_num_heads"]),
                num_layers=int(values["medusa_num_layers"]), own_lm_heads=bool(ours["own_lm_heads"]),
            )
        else:
            config = _counted(stored)
        return config, target, card
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the Medusa heads in {where} are damaged: {error!r}", field="heads",
                              remedy=HEAD_REMEDY) from error


def _counted(stored: Mapping[str, tuple[int, ...]]) -> MedusaConfig:
    heads = {int(found[1]) for name in stored if (found := re.match(r"(\d+)\.", name))}
    outputs = {int(found[1]) for name in stored if (found := re.fullmatch(r"0\.(\d+)\.weight", name))}
    if not heads or len(outputs) != 1:
        raise ValueError("tensors 0.0.linear.weight … 0.1.weight, 1.0.linear.weight … are expected")
    (layers,) = outputs
    vocabulary, hidden = stored[f"0.{layers}.weight"]
    return MedusaConfig(hidden_size=hidden, vocab_size=vocabulary, draft_vocab_size=vocabulary,
                        num_heads=max(heads) + 1, num_layers=layers, own_lm_heads=True)
