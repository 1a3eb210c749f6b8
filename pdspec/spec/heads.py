"""Draft heads as folders: where they are found and which target they were made for. No torch.

config.json          geometry under the field's usual keys; under "pdspec" the target's hashes and the training card
model.safetensors    see ``headfile.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.model.config import ModelConfig
from pdspec.model.fingerprint import geometry

SHIPPED_HEADS = Path(__file__).parent.parent / "heads"
FORMAT = 1
HEAD_REMEDY = "fetch or train the head again"
_RANDOM = re.compile(r"random:(\d+)")


@dataclass(frozen=True, kw_only=True)
class TargetIdentity:
    """The target a head was trained on, or is to serve: hashes (hex, see ``model.fingerprint``) and geometry."""

    content_hash: str
    tokenizer_hash: str
    geometry: dict[str, Any]

    @classmethod
    def of(cls, config: ModelConfig, *, content_hash: str, tokenizer_hash: str) -> TargetIdentity:
        """Of a model in hand."""
        values = json.loads(json.dumps(geometry(config)))
        return cls(content_hash=content_hash, tokenizer_hash=tokenizer_hash, geometry=values)

    def is_like(self, other: TargetIdentity) -> bool:
        """Same geometry and tokenizer, whatever the content."""
        return (self.geometry, self.tokenizer_hash) == (other.geometry, other.tokenizer_hash)

    def check_serves(self, serving: TargetIdentity, where: str) -> None:
        """Raises Incompatible naming the first field in which the target that is ``serving`` differs in geometry or
        tokenizer. Other content of the same geometry is no error."""
        fields = {**{f"geometry.{k}": v for k, v in self.geometry.items()}, "tokenizer_hash": self.tokenizer_hash}
        other = {**{f"geometry.{k}": v for k, v in serving.geometry.items()}, "tokenizer_hash": serving.tokenizer_hash}
        for name in sorted(fields.keys() | other.keys()):
            if fields.get(name) != other.get(name):
                raise Incompatible(
                    f"the head in {where} was made for a target with {name} = {fields.get(name)!r}, this target has"
                    f" {other.get(name)!r}",
                    field=name,
                    remedy="choose the head made for this target, or drafter ngram or none",
                )


def random_seed(where: str) -> int | None:
    """The seed of ``random:SEED``, None for a folder."""
    found = _RANDOM.fullmatch(where)
    return int(found[1]) if found else None


def find_head(name: str, heads: Mapping[str, str], target: TargetIdentity) -> str:
    """Folder (or ``random:SEED``) of the head: the one named in ``heads``, else the shipped one made for a target
    of this geometry and tokenizer, for this very content if there is one. Raises ConfigError where there is none."""
    if heads.get(name):
        return heads[name]
    fitting = []
    for path in sorted(SHIPPED_HEADS.glob(f"{name}-*/config.json")):
        made_for, _ = read_section(read_head_json(path.parent), path.parent)
        if made_for is not None and made_for.is_like(target):
            fitting.append((made_for.content_hash != target.content_hash, str(path.parent)))
    if not fitting:
        raise ConfigError(
            f"no {name} head for this target is shipped",
            field=f"heads.{name}",
            remedy=f"train one with pdspec train {name.replace('_', '-')} and name its folder, or choose drafter ngram"
            " or none",
        )
    return min(fitting)[1]


def read_head_json(folder: Path) -> dict[str, Any]:
    """``config.json`` of a head folder. Raises CheckpointError naming the file."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", field="heads", remedy=HEAD_REMEDY) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object", field="heads", remedy=HEAD_REMEDY)
    return values


def section(target: TargetIdentity | None, card: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The ``pdspec`` entry of ``config.json``."""
    ours: dict[str, Any] = {"format": FORMAT, **more, "card": dict(card)}
    if target is not None:
        ours["target"] = {
            "content_hash": target.content_hash,
            "tokenizer_hash": target.tokenizer_hash,
            "geometry": target.geometry,
        }
    return ours


def read_section(values: Mapping[str, Any], where: Path) -> tuple[TargetIdentity | None, dict[str, Any]]:
    """(target the head was made for, card). Raises CheckpointError for a damaged section, ConfigError for one of
    another format."""
    ours = values.get("pdspec") or {}
    try:
        if ours.get("format", FORMAT) != FORMAT:
            raise ConfigError(
                f"the head in {where} has format {ours['format']!r}, which pdspec cannot read",
                field="heads",
                remedy="choose a head of this version, or a newer pdspec",
            )
        made_for = ours.get("target")
        return TargetIdentity(**made_for) if made_for else None, dict(ours.get("card") or {})
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"config.json of the head in {where} is damaged: {error!r}", field="heads", remedy=HEAD_REMEDY
        ) from error
