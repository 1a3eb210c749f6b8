"""Which model drafts, and its geometry. No torch."""

from __future__ import annotations

from dataclasses import replace

from pdspec.model.config import ModelConfig, read_config
from pdspec.model.hub import locate
from pdspec.model.tiny import tiny_config
from pdspec.spec.family import Setting
from pdspec.spec.heads import find_head, random_seed

GROUP = "draft/model"


def draft_name(setting: Setting) -> str:
    """What ``heads.draft_model`` says, else the shipped one made for the target. Raises ConfigError without one."""
    return find_head("draft_model", setting.heads, setting.identity)


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
