"""Weights of a draft model, and the proof that its token ids mean what the target's mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pdspec.errors import Incompatible
from pdspec.model.config import ModelConfig, weight_shapes
from pdspec.model.files import ModelFiles, resolve
from pdspec.model.hub import locate
from pdspec.model.loader import load_weights, torch_dtype
from pdspec.model.tokenizer import load_tokenizer
from pdspec.spec.draft_model.config import draft_name, random_config
from pdspec.spec.draft_model.trained import Trained, is_trained, load_trained
from pdspec.spec.family import Setting
from pdspec.spec.headfile import check_target
from pdspec.spec.heads import random_seed


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """``weights`` by Hugging Face key, in the deployment's dtype; embedding and output rows are not among them where
    it ``borrows`` the target's. ``target_ids`` int64 are those that it may draft."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    content_hash: str
    target_ids: torch.Tensor
    borrows: bool = False


def open_model(setting: Setting) -> DraftModel:
    """The model that ``heads.draft_model`` names. Raises Incompatible (another tokenizer) and what ``resolve`` and
    ``load_weights`` raise."""
    name = draft_name(setting)
    if (seed := random_seed(name)) is not None:
        config = random_config(setting.target.config)
        weights = _random_weights(config, seed, torch_dtype(setting.dtype))
        return DraftModel(config=config, weights=weights, content_hash=f"random:{seed}",
                          target_ids=_common_ids(setting, config))
    where = locate(name, setting.cache_dir or None)
    if where.path is not None and is_trained(where.path):
        return _open_trained(setting, load_trained(where.path), name)
    files = resolve(name, setting.cache_dir or None)
    check_tokenizers(setting.target, files)
    weights = load_weights(files, setting.dtype)
    return DraftModel(config=files.config, weights=weights, content_hash=files.content_hash,
                      target_ids=_common_ids(setting, files.config))


def _open_trained(setting: Setting, head: Trained, where: str) -> DraftModel:
    check_target(head, setting.identity, where, strict=setting.strict)
    weights = {key: tensor.to(torch_dtype(setting.dtype)) for key, tensor in head.tensors.items()}
    return DraftModel(config=head.config, weights=weights, content_hash=head.fingerprint(),
                      target_ids=head.target_ids, borrows=True)


def _common_ids(setting: Setting, draft: ModelConfig) -> torch.Tensor:
    """Ids that both models have rows for."""
    return torch.arange(min(draft.vocab_size, setting.target.config.vocab_size))


def check_tokenizers(target: ModelFiles, draft: ModelFiles) -> None:
    """Every id must have the same text in both. How many rows the two models have beyond their tokens does not matter.
    Raises Incompatible naming the first id that differs and both texts."""
    if target.tokenizer_hash == draft.tokenizer_hash:
        return  # hashes of the very lists compared below
    check_vocabularies(load_tokenizer(target).vocabulary(), load_tokenizer(draft).vocabulary(), target.name, draft.name)


def check_vocabularies(target: Mapping[int, str], draft: Mapping[int, str], target_name: str, draft_name: str) -> None:
    """See ``check_tokenizers``; {id: text}."""
    for token_id in sorted(target.keys() | draft.keys()):
        ours, theirs = target.get(token_id), draft.get(token_id)
        if ours != theirs:
            raise Incompatible(
                f"token {token_id} is {_shown(ours)} in {target_name} and {_shown(theirs)} in {draft_name}",
                field="heads.draft_model", remedy="choose a draft model with the target's tokenizer",
            )


def _shown(text: str | None) -> str:
    return "absent" if text is None else repr(text)


def _random_weights(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        return noise if name == "model.embed_tokens.weight" else noise * shape[1] ** -0.5

    return {name: values(name, shape).to(dtype) for name, shape in weight_shapes(config).items()}
