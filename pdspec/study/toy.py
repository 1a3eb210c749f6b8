"""A target so small that everything it can say can be counted: six tokens, three layers, random weights.

It is a checkpoint folder like any other, so the whole of production runs on it: loader, kernels, drafters, engines.
Its next token depends on the whole context. Tokens ``TWINS`` always have the same score, to the bit: where they are
best, the lower id must win.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pdspec.config import WorkerConfig
from pdspec.model.config import parse_config, weight_shapes
from pdspec.model.gguf_convert import bpe_model
from pdspec.model.tensorfile import write_tensors
from pdspec.spec.registry import NAMES

VOCABULARY = 6
TWINS = (1, 4)
CONTEXT = 512
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
}  # fmt: skip
_GAINS = {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 1.5}
# What a family drafts on the toy, by kind of tree, and what it drafts where there is time for more.
TREES = {"chain": "chain(2)", "static": "static(2x1)", "dynamic": "dynamic(2,2,3)"}
LARGE_TREES = {"chain": "chain(3)", "static": "static(2x2)", "dynamic": "dynamic(3,2,5)"}
# Families that draft from all six tokens: a level less, or there are too many drafts to count.
WIDE = ("draft_model", "sparse")
WIDE_STATIC, WIDE_LARGE_STATIC = "static(2)", "static(2x1)"
# Heads that are no ``random:SEED``; {} stands for the folder of the toys.
HEADS = {"draft_model": "{}/drafter"}
OPTIONS = {"sparse:sink": "1", "sparse:window": "4", "mtp:modules": "3"}  # less than a prompt; as deep as trees


def write_toys(folder: Path) -> None:
    """``folder``/target, and ``folder``/drafter: another model of the same tokens."""
    for seed, name in enumerate(("target", "drafter")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        _write(folder / name, seed)


def toy_config(folder: Path, drafters: Sequence[str] = NAMES, **changes: object) -> WorkerConfig:
    """A worker that serves the toy in ``folder`` with these families, their heads random."""
    heads = {name: HEADS.get(name, "random:7").format(folder) for name in drafters if name != "none"}
    values = {
        "model": str(folder / "target"), "dtype": "float32", "drafters": list(drafters), "drafter": drafters[0],
        "heads": heads, "options": OPTIONS, "cache_tokens": 8192, "threads": 1, "chunk": 4, "poison": True,
    }  # fmt: skip
    return WorkerConfig.from_mapping({**values, **changes})


def toy_tree(name: str, kind: str, *, large: bool) -> str:
    """What family ``name`` drafts for a kind of tree; empty for a family that drafts nothing."""
    if name in WIDE and kind == "static":
        return WIDE_LARGE_STATIC if large else WIDE_STATIC
    return (LARGE_TREES if large else TREES).get(kind, "")


def _write(folder: Path, seed: int) -> None:
    random = np.random.Generator(np.random.PCG64(seed))
    tensors = {}
    for name, shape in weight_shapes(parse_config(dict(_CONFIG), "toy")).items():
        if len(shape) == 1:
            values = 1.0 + 0.1 * random.standard_normal(shape)
        else:
            gain = _GAINS.get(name.split(".")[-2], 1.0)
            values = random.standard_normal(shape) * (1.0 if "embed" in name else gain * shape[1] ** -0.5)
        tensors[name] = values.astype(np.float32)
    tensors["lm_head.weight"][TWINS[1]] = tensors["lm_head.weight"][TWINS[0]]
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, object] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": bpe_model({chr(ord("a") + index): index for index in range(VOCABULARY)}, []),
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
