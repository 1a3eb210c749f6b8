"""Which model drafts, and its geometry. No torch."""

from __future__ import annotations

from dataclasses import replace

from pdspec.errors import ConfigError
from pdspec.model.config import ModelConfig, read_config
from pdspec.model.hub import locate
from pdspec.model.tiny import tiny_config
from pdspec.spec.family import Setting
from pdspec.spec.heads import random_seed

GROUP = "draft/model"
_FIELD = "heads.draft_model"


def draft_name(setting: Setting) -> str:
    """What ``heads.draft_model`` says. Raises ConfigError when it says nothing: no model is shipped."""
    name = setting.heads.get("draft_model", "")
    if not name:
        raise ConfigError("no draft model is named", field=_FIELD,
                          remedy="name an alias, hub id or folder of a smaller model with the target's tokenizer")
    return name


def draft_config(setting: Setting) -> ModelConfig:
    """The draft model's geometry; weights are not read. Raises what ``locate`` and ``read_config`` raise."""
    name = draft_name(setting)
    if random_seed(name) is not None:
        return random_config(setting.target.config)
    where = locate(name, setting.cache_dir or None)
    return tiny_config(name) if where.path is None else read_config(where.path, name)


def random_config(target: ModelConfig) -> ModelConfig:
    """Of ``random:SEED``: one layer of the target's sizes over its vocabulary."""
    return replace(target, name="random", num_layers=1, tie_embeddings=False)
