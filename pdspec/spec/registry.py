"""The drafters that can be chosen, what each needs, and how one is made. Imports no torch until a drafter is made.

A drafter's cache groups must be known before the cache exists, so it is two steps:

    groups = draft_groups(names, heads=…, target=…, dtype=…)      the cache is made with these
    drafter = make_drafter(name, ops=…, cache=cache, …)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdspec.errors import CheckpointError, ConfigError, UnknownName
from pdspec.model.config import ModelConfig
from pdspec.spec.eagle3.config import Eagle3Config, TargetIdentity, parse_head, read_head_json
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.cache.paged import PagedCache
    from pdspec.model.ops import Ops
    from pdspec.spec.eagle3.checkpoint import Head
    from pdspec.spec.protocol import Drafter

SHIPPED_HEADS = Path(__file__).parent.parent / "heads"
_RANDOM = re.compile(r"random:(\d+)")
_RANDOM_DRAFT_VOCABULARY = 4096


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``pdspec drafters`` says of one drafter."""

    name: str
    summary: str
    needs: str  # beyond the target
    ships: str  # from the prefill to the decode worker
    trees: tuple[str, ...]  # kinds of ``tree``
    default_tree: str
    source: str
    default_tree_gpu: str = ""  # where it is another one


# A row more costs a CPU real compute from the third row on; a GPU takes eight for the price of one.
_EAGLE3_TREE, _EAGLE3_TREE_GPU = "chain(2)", "dynamic(4,4,8)"

_DESCRIPTIONS = (
    Description(name="none", summary="plain decoding", needs="", ships="", trees=(), default_tree="", source=""),
    Description(
        name="ngram", summary="prompt lookup: what followed these tokens the last time they stood here", needs="",
        ships="", trees=("chain",), default_tree="chain(7)", source="Saxena 2023, Prompt Lookup Decoding",
    ),
    Description(
        name="suffix", summary="what followed these tokens in this request and in earlier answers, by frequency",
        needs="", ships="", trees=("chain", "dynamic"), default_tree="dynamic(8,4,8)",
        source="Oliaro et al. 2024, SuffixDecoding, arXiv 2411.04975",
    ),
    Description(
        name="eagle3", summary="one decoder layer over three fused levels of the target, with a draft vocabulary",
        needs="a head trained for the target (shipped for smollm2-135m; else heads.eagle3: FOLDER or random:SEED)",
        ships="draft KV of the prompt, first draft tokens with log q, one hidden row",
        trees=("chain", "static", "dynamic"), default_tree=_EAGLE3_TREE, default_tree_gpu=_EAGLE3_TREE_GPU,
        source="Li et al. 2025, EAGLE-3, arXiv 2503.01840; trees: EAGLE-2, arXiv 2406.16858",
    ),
)
NAMES = tuple(description.name for description in _DESCRIPTIONS)


def describe() -> list[dict[str, Any]]:
    """One mapping per drafter, as ``pdspec drafters --json`` prints them."""
    return [asdict(description) for description in _DESCRIPTIONS]


def draft_groups(
    names: Sequence[str], *, heads: Mapping[str, str], model_config: ModelConfig, tokenizer_hash: str,
    content_hash: str, dtype: str,
) -> tuple[CacheGroup, ...]:
    """The cache groups that these drafters keep, KV rows in ``dtype``. Raises as ``make_drafter``."""
    for name in names:
        _check_name(name)
    if "eagle3" not in names:
        return ()
    target = TargetIdentity.of(model_config, content_hash=content_hash, tokenizer_hash=tokenizer_hash)
    where = find_head("eagle3", heads, target)
    if _RANDOM.fullmatch(where):
        return (_random_config(model_config).cache_group(dtype),)
    config, _, _ = parse_head(read_head_json(Path(where)), Path(where), model_config.num_layers)
    return (config.cache_group(dtype),)


def make_drafter(
    name: str, *, ops: Ops, cache: PagedCache, model_config: ModelConfig, embedding: Any, heads: Mapping[str, str],
    tokenizer_hash: str, content_hash: str, dtype: str, strict: bool = False, tree: str = "",
) -> Drafter:
    """The drafter ``name`` for this target. ``embedding`` is the target's, packed by ``ops``; ``heads`` maps drafter to
    folder (or ``random:SEED``), without an entry the shipped head serves; ``tree`` is what eagle3 drafts for requests
    that name none (empty: what suits the device).

    Raises UnknownName, Incompatible (a head of another geometry or tokenizer; of other content when ``strict``),
    CheckpointError (a damaged head) or ConfigError (no head for this target).
    """
    _check_name(name)
    if name == "none":
        from pdspec.spec.none import NoDrafter

        return NoDrafter()
    if name == "ngram":
        from pdspec.spec.ngram import NgramDrafter

        return NgramDrafter()
    if name == "suffix":
        from pdspec.spec.suffix.drafter import SuffixDrafter

        return SuffixDrafter()
    from pdspec.spec.eagle3.checkpoint import check_target
    from pdspec.spec.eagle3.drafter import Eagle3Drafter
    from pdspec.spec.eagle3.head import Eagle3Head

    target = TargetIdentity.of(model_config, content_hash=content_hash, tokenizer_hash=tokenizer_hash)
    where = find_head(name, heads, target)
    head = open_head(where, model_config, target)
    matches = check_target(head, target, where, strict=strict)
    if max(head.config.fused_layers) >= model_config.num_layers:
        raise CheckpointError(
            f"the head in {where} fuses layers {head.config.fused_layers}, the target has {model_config.num_layers}",
            field="fused_layers", remedy="choose the head made for this target",
        )
    model = Eagle3Head(
        head, ops=ops, embedding=embedding, cache=cache, dtype=dtype, max_positions=model_config.max_context
    )
    tree = tree or (_EAGLE3_TREE if ops.device.type == "cpu" else _EAGLE3_TREE_GPU)
    return Eagle3Drafter(head, model, cache, dtype=dtype, tree=tree, target_matches=matches)


def find_head(name: str, heads: Mapping[str, str], target: TargetIdentity) -> str:
    """Folder (or ``random:SEED``) of the head: the one named in ``heads``, else the shipped one made for a target
    of this geometry and tokenizer, for this very content if there is one. Raises ConfigError where there is none."""
    if heads.get(name):
        return heads[name]
    fitting = []
    for path in sorted(SHIPPED_HEADS.glob(f"{name}-*/config.json")):
        _, made_for, _ = parse_head(read_head_json(path.parent), path.parent)
        if made_for is not None and made_for.is_like(target):
            fitting.append((made_for.content_hash != target.content_hash, str(path.parent)))
    if not fitting:
        raise ConfigError(
            f"no {name} head for this target is shipped", field=f"heads.{name}",
            remedy=f"train one with pdspec train {name} and name its folder, or choose drafter ngram or none",
        )
    return min(fitting)[1]


def open_head(where: str, model_config: ModelConfig, target: TargetIdentity) -> Head:
    """The head that ``find_head`` named. Raises CheckpointError for a damaged one."""
    from pdspec.spec.eagle3.checkpoint import load_head, random_head

    if seed := _RANDOM.fullmatch(where):
        return random_head(_random_config(model_config), int(seed[1]), target)
    return load_head(Path(where), model_config.num_layers)


def _random_config(model_config: ModelConfig) -> Eagle3Config:
    return Eagle3Config.for_target(model_config, min(_RANDOM_DRAFT_VOCABULARY, model_config.vocab_size // 2))


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise UnknownName(f"no drafter {name!r}", field="drafter", remedy="choose one of " + ", ".join(NAMES))
