"""A draft model of its own: which one, whether it shares the target's tokens, and the drafter over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdspec.spec.draft_model.config import GROUP, draft_config, draft_name
from pdspec.spec.family import Description, Parts, Setting
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.model.runner import Runner
    from pdspec.spec.draft_model.checkpoint import DraftModel
    from pdspec.spec.protocol import Drafter

_TREE, _TREE_GPU = "chain(4)", "dynamic(5,4,8)"

DESCRIPTION = Description(
    name="draft_model", summary="a smaller decoder with the target's tokenizer, over a KV cache of its own",
    needs="heads.draft_model: an alias, hub id or folder of a model with the same tokenizer (or random:SEED),"
    " where none is shipped for the target",
    ships="its KV of the prompt and the first token, first draft tokens with log q",
    trees=("chain", "static", "dynamic"), default_tree=_TREE, default_tree_gpu=_TREE_GPU,
    source="Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318",
)


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """All of its layers."""
    return (draft_config(setting).cache_group(GROUP, setting.dtype),)


def make(setting: Setting, parts: Parts) -> Drafter:
    """The model that ``heads.draft_model`` names. Raises Incompatible for another tokenizer (naming the first token in
    which they differ), and for one trained for another target."""
    from pdspec.cache.paged import DTYPES
    from pdspec.model.runner import Runner
    from pdspec.spec.draft_model.checkpoint import open_model
    from pdspec.spec.draft_model.drafter import ModelDrafter
    from pdspec.spec.feature_rows import output_rows

    def load() -> tuple[DraftModel, Runner]:
        model = open_model(setting)
        shared: dict[str, Any] = {}
        if model.borrows:
            rows = output_rows(parts.ops, parts.runner.lm_head, model.target_ids, DTYPES[setting.dtype])
            shared = {"embedding": parts.runner.embedding, "lm_head": rows}
        return model, Runner(model.config, model.weights, ops=parts.ops, dtype=setting.dtype, group=GROUP, **shared)

    model, runner = parts.once(DESCRIPTION.name, draft_name(setting), load)
    tree = _TREE if parts.ops.device.type == "cpu" else _TREE_GPU
    return ModelDrafter(runner, parts.cache, target_ids=model.target_ids, content_hash=model.content_hash, tree=tree)
