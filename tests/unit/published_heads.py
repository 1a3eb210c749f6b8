"""Small checkpoints with exactly the key names, shapes, files and config fields of published draft heads, and what each
head computes by its equations (``published_equations.py``). Made for the tiny target."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import published_equations as eq
import torch
from safetensors.torch import save_file

from pdspec.cache.paged import PagedCache
from pdspec.model.files import ModelFiles
from pdspec.model.loader import load_weights
from pdspec.model.ops import Ops
from pdspec.model.runner import Runner
from pdspec.model.tiny import tiny_config, tiny_tensors
from pdspec.spec.family import Parts, Setting
from pdspec.spec.protocol import Drafter
from pdspec.spec.registry import draft_groups, make_drafter

TARGET = tiny_config("tiny")
FILES = ModelFiles(name="tiny-0", path=None, config=TARGET, content_hash="c0", tokenizer_hash="t0")
H, V, HEADS, KV, D, INNER, LAYERS = 64, 272, 4, 2, 16, 128, 4
EPS, DRAFT = 1e-5, 40
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": H,
    "intermediate_size": INNER, "max_position_embeddings": 2048, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "num_hidden_layers": 1, "rms_norm_eps": EPS, "vocab_size": V, "torch_dtype": "float16",
}
PLAIN: dict[str, Any] = {"head_dim": D, "theta": 10000.0, "eps": EPS}
Reference = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # embedded [R, H], features → hidden [R, H]


def target_weight(name: str) -> torch.Tensor:
    bits = torch.from_numpy(tiny_tensors(0)[name].astype("int32")) << 16
    return bits.view(torch.float32)


EMBEDDING = target_weight("model.embed_tokens.weight")


@dataclass(frozen=True, kw_only=True)
class Published:
    """``hidden`` is what the head computes. Written by ``write``."""

    family: str
    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    hidden: Reference
    file: str = "model.safetensors"
    embedding: torch.Tensor = EMBEDDING  # that the head reads
    inside: bool = False  # a target's sharded checkpoint, of which only the modules' file is here

    def write(self, folder: Path, **changes: torch.Tensor | None) -> Path:
        """With some tensors changed, or None: left out."""
        folder.mkdir(parents=True, exist_ok=True)
        merged = {**self.weights, **changes}
        tensors = {name: tensor.clone() for name, tensor in merged.items() if tensor is not None}
        (folder / "config.json").write_text(json.dumps(self.config))
        if not self.inside:
            if self.file.endswith("safetensors"):
                save_file(tensors, folder / self.file)
            else:
                torch.save(tensors, folder / self.file)
            return folder
        shard, rest = "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"
        save_file(tensors, folder / shard)
        names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")
        index = {"metadata": {}, "weight_map": {**dict.fromkeys(names, rest), **dict.fromkeys(tensors, shard)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def setting(self, folder: Path) -> Setting:
        return Setting(target=FILES, dtype="float32", heads={self.family: str(folder)})


def make(setting: Setting, ops: Ops) -> Drafter:
    """The drafter of the one head named, over the tiny target."""
    (name,) = setting.heads
    groups = (TARGET.target_group("float32"), *draft_groups([name], setting))
    runner = Runner(TARGET, load_weights(FILES, "float32"), ops=ops, dtype="float32")
    return make_drafter(name, setting, Parts(ops=ops, cache=PagedCache(groups, 8, 8), runner=runner))


def values(name: str, *shape: int) -> torch.Tensor:
    """The same for the same name; variance of inputs is kept, norms are around 1, biases around 0."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return noise * shape[-1] ** -0.5 * (2.0 if "q_proj" in name or "gate.weight" in name else 1.0)
    return (0.0 if name.endswith("bias") else 1.0) + 0.2 * noise


def made(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: values(name, *shape) for name, shape in shapes.items()}


def attention_shapes(prefix: str, inputs: int = H, *, bias: bool = False, norms: bool = False, gated: bool = False
                     ) -> dict[str, tuple[int, ...]]:
    rows, shapes = {"q": HEADS * D * (2 if gated else 1), "k": KV * D, "v": KV * D}, dict[str, tuple[int, ...]]()
    for letter, count in rows.items():
        shapes[f"{prefix}{letter}_proj.weight"] = (count, inputs)
        if bias:
            shapes[f"{prefix}{letter}_proj.bias"] = (count,)
    shapes[f"{prefix}o_proj.weight"] = (H, HEADS * D)
    return shapes | {f"{prefix}{n}_norm.weight": (D,) for n in ("q", "k") if norms}


def mlp_shapes(prefix: str, inner: int = INNER) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}gate_proj.weight": (inner, H), f"{prefix}up_proj.weight": (inner, H),
            f"{prefix}down_proj.weight": (H, inner)}


def draft_vocabulary() -> dict[str, torch.Tensor]:
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(5))[:DRAFT].sort().values
    return {"d2t": ids - torch.arange(DRAFT), "t2d": torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)}


def eagle1_of(fc: str, layer: str, config: Mapping[str, Any], *, file: str, fc_bias: bool, **more: Any) -> Published:
    bias = bool(more.get("bias"))
    weights = made({
        f"{fc}weight": (H, 2 * H), **({f"{fc}bias": (H,)} if fc_bias else {}),
        **attention_shapes(f"{layer}self_attn.", bias=bias), **mlp_shapes(f"{layer}mlp."),
        f"{layer}post_attention_layernorm.weight": (H,),
    })
    known = {**PLAIN, **more, "fc_bias": fc_bias}
    return Published(
        family="eagle1", config=config, file=file, weights={**weights, "embed_tokens.weight": EMBEDDING.clone()},
        hidden=lambda e, f: eq.eagle1(e, f, eq.reader(weights, fc), eq.reader(weights, layer), known),
    )


def eagle3_of(layer: str, config: Mapping[str, Any], *, file: str = "model.safetensors", own_embedding: bool = False,
              **more: Any) -> Published:
    weights = made({
        "fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (DRAFT, H),
        **attention_shapes(f"{layer}self_attn.", 2 * H, norms=bool(more.get("norms"))), **mlp_shapes(f"{layer}mlp."),
        **{f"{layer}{name}.weight": (H,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        **({"input_norm.weight": (3 * H,)} if more.get("norm_before_fc") else {}),
    })
    embedding = values("own embedding", V, H) * 8 if own_embedding else EMBEDDING
    return Published(
        family="eagle3", config=config, file=file, embedding=embedding,
        weights={**weights, **draft_vocabulary(), "embed_tokens.weight": embedding.clone()},
        hidden=lambda e, f: eq.eagle3(e, f, eq.reader(weights), eq.reader(weights, layer), {**PLAIN, **more}),
    )


def medusa_of(heads: int, blocks: int, file: str, prefix: str = "") -> Published:
    """The config of published ones says two heads whatever there are."""
    weights = made({
        **{f"{prefix}{k}.{j}.linear.{kind}": ((H, H) if kind == "weight" else (H,))
           for k in range(heads) for j in range(blocks) for kind in ("weight", "bias")},
        **{f"{prefix}{k}.{blocks}.weight": (V, H) for k in range(heads)},
    })  # fmt: skip

    def hidden(_: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """2401.10774, section 2.1.1, of all heads [R, heads, V]: W2 (x + SiLU(W1 x + b)) for one block."""
        out = []
        for k in range(heads):
            x, w = h, eq.reader(weights, f"{prefix}{k}.")
            for j in range(blocks):
                x = x + eq.silu(x @ w(f"{j}.linear.weight").T + w(f"{j}.linear.bias"))
            out.append(x @ w(f"{blocks}.weight").T)
        return torch.stack(out, 1)

    config = {"medusa_num_heads": 2, "medusa_num_layers": blocks, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    return Published(family="medusa", config=config, weights=weights, hidden=hidden, file=file)


SPECULATORS: dict[str, Any] = {
    "speculators_version": "0.5.0", "has_no_defaults_at_init": False, "tie_word_embeddings": False,
    "speculators_config": {
        "default_proposal_method": "greedy", "algorithm": "eagle3",
        "verifier": {"name_or_path": "tiny", "architectures": ["LlamaForCausalLM"]},
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}],
    },
}


def speculators(kind: str, model: str, layer: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    inside = {**LLAMA, "head_dim": D, "attention_bias": False, "mlp_bias": False, **layer}
    return {**SPECULATORS, "architectures": [model], "model_type": "speculator_model", "speculators_model_type": kind,
            "transformer_layer_config": inside, **more}


EAGLES = {
    "SafeAILab EAGLE-1": eagle1_of("fc.", "layers.0.", LLAMA, file="pytorch_model.bin", fc_bias=True),
    "SafeAILab EAGLE-1 for Qwen2": eagle1_of(
        "fc.", "layers.0.", {**LLAMA, "model_type": "qwen2", "qkv_bias": True, "bias": False, "rope_theta": 1e6},
        file="model.safetensors", fc_bias=False, bias=True, theta=1e6,
    ),
    "speculators eagle": eagle1_of(
        "fusion_fc.", "transformer.", speculators(
            "eagle", "EagleSpeculator", {}, transformer_layer_architecture="LlamaDecoderLayer", layernorms=False,
            fusion_bias=False,
        ), file="model.safetensors", fc_bias=False,
    ),
    "SafeAILab EAGLE-3": eagle3_of("midlayer.", {**LLAMA, "draft_vocab_size": DRAFT}, file="pytorch_model.bin"),
    "SpecForge": eagle3_of("midlayer.", {
        **LLAMA, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT, "attention_bias": False,
        "rope_scaling": None, "rope_theta": 1e6, "sliding_window": 131072, "use_sliding_window": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 1], "use_aux_hidden_state": True},
    }, theta=1e6),
    "speculators eagle3": eagle3_of("layers.0.", speculators(
        "eagle3", "Eagle3DraftModel", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        draft_vocab_size=DRAFT, norm_before_residual=True, norm_before_fc=False, fc_norm=False, norm_output=False,
        target_hidden_size=None, eagle_aux_hidden_state_layer_ids=[1, 3, 2], embed_requires_grad=True,
    ), own_embedding=True, norm_before_residual=True, theta=5e5),
    "speculators eagle3 of Qwen3": eagle3_of("layers.0.", speculators(
        "eagle3", "Eagle3DraftModel", {"model_type": "qwen3"}, draft_vocab_size=DRAFT, norm_before_residual=False,
        norm_before_fc=True, eagle_aux_hidden_state_layer_ids=None,
    ), norms=True, norm_before_fc=True),
}  # fmt: skip
MEDUSAS = {
    "Medusa .pt": medusa_of(5, 1, "medusa_lm_head.pt"),
    "Medusa safetensors, two blocks": medusa_of(3, 2, "medusa_lm_head.safetensors", "medusa_head."),
}
