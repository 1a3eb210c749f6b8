"""Checkpoint folders: four architectures read as transformers wrote them; everything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pdspec.errors import CheckpointError, ConfigError, UnknownName
from pdspec.model.config import parse_config, weight_shapes
from pdspec.model.hub import locate
from pdspec.model.loader import load_weights, resolve
from pdspec.model.reference import reference_model
from pdspec.model.tensorfile import read_header, to_bfloat16, write_tensors
from pdspec.model.tiny import byte_tokenizer, tiny_tensors

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def write_checkpoint(folder: Path, architecture: str = "Llama", shard: str = "5GB", **changes: Any) -> torch.nn.Module:
    """A random checkpoint as transformers saves it, with the byte tokenizer."""
    torch.manual_seed(0)
    config = getattr(transformers, architecture + "Config")(**{**SIZES, **changes})
    model = getattr(transformers, architecture + "ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return model


def values(**changes: Any) -> dict[str, Any]:
    """``config.json`` of the small Llama with some values changed."""
    return {**SIZES, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-6, **changes}


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors of a checkpoint in place."""
    path = folder / "model.safetensors"
    data, entries = path.read_bytes(), read_header(path)
    tensors = {
        key: np.frombuffer(data[one.start : one.stop], np.uint16).reshape(one.shape) for key, one in entries.items()
    }
    change(tensors)
    write_tensors(path, tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_transformers_writes(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = write_checkpoint(tmp_path, architecture, tie_word_embeddings=tied, rope_theta=5000.0, head_dim=8)
    files = resolve(str(tmp_path))
    config, weights = files.config, load_weights(files, "bfloat16")
    state = model.state_dict()
    assert set(weights) == {key for key in state if key != "lm_head.weight" or not tied}
    assert all(torch.equal(one, state[key]) for key, one in weights.items())
    assert {one.dtype for one in load_weights(files, "float32").values()} == {torch.float32}
    assert config.architecture == architecture + "ForCausalLM" and config.tie_embeddings is tied
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert (config.rope_theta, config.rope_scaling, config.dtype) == (5000.0, None, "bfloat16")
    assert (config.qkv_bias, config.qk_norm) == (architecture == "Qwen2", architecture == "Qwen3")
    assert (config.bos_ids, config.eos_ids, config.max_context) == ((256,), (257,), 256)


def test_reference_model_has_the_same_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "Qwen3")
    files = resolve(str(tmp_path))
    state = reference_model(files, "float32").state_dict()
    assert all(torch.equal(one, state[key]) for key, one in load_weights(files, "float32").items())


def test_shards_hold_the_same_content(tmp_path: Path) -> None:
    for name, shard in (("one", "5GB"), ("many", "20KB")):
        (tmp_path / name).mkdir()
        write_checkpoint(tmp_path / name, shard=shard)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = resolve(str(tmp_path / "one")), resolve(str(tmp_path / "many"))
    assert one.content_hash == many.content_hash
    assert all(torch.equal(a, b) for a, b in zip(load_weights(one).values(), load_weights(many).values(), strict=True))
    lost = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {lost.name}"):
        resolve(str(tmp_path / "many"))


def test_llama3_rope_in_both_spellings() -> None:
    rule = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = parse_config(values(rope_scaling={"rope_type": "llama3", **rule}, rope_theta=7.0), "m")
    new = parse_config(values(rope_parameters={"rope_type": "llama3", "rope_theta": 7.0, **rule}), "m")
    assert old == new and new.rope_theta == 7.0
    assert new.rope_scaling == {"rope_type": "llama3", **rule}


@pytest.mark.parametrize(
    ("changes", "max_context"),
    [
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 4096}, 256),
        ({"sliding_window": 64, "use_sliding_window": False}, 256),
        ({"sliding_window": None}, 256),
        ({"sliding_window": 64, "layer_types": ["full_attention"] * 2}, 256),
        ({"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, 64),
    ],
)
def test_a_sliding_window_caps_the_context(changes: dict[str, Any], max_context: int) -> None:
    assert parse_config(values(architectures=["MistralForCausalLM"], **changes), "m").max_context == max_context


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*one of LlamaForCausalLM, Mistral.*Qwen2.*Qwen3"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'.*one of default, linear, llama3, yarn"),
        ({"num_key_value_heads": 3}, "no multiple of num_kv_heads=3"),
        ({"eos_token_id": 264}, "end token 264"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"torch_dtype": "int8"}, "dtype=int8"),
    ],
)
def test_what_cannot_be_run_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(values(**changes), "m")


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(CheckpointError, match="config.json of m lacks 'rms_norm_eps'"):
        parse_config({key: value for key, value in values().items() if key != "rms_norm_eps"}, "m")


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def cut_rows(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


def add_bias(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.o_proj.bias"] = tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop, "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (cut_rows, r"model.norm.weight in .*model.safetensors has shape \[31\], config.json asks for \[32\]"),
        (add_bias, "o_proj.bias in .* has no place in a LlamaForCausalLM"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], named: str) -> None:
    write_checkpoint(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=named):
        resolve(str(tmp_path))


def test_harmless_extra_tensors_are_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tie_word_embeddings=True)

    def extend(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"]

    before = resolve(str(tmp_path))
    rewrite(tmp_path, extend)
    after = resolve(str(tmp_path))
    assert after.content_hash == before.content_hash
    assert set(load_weights(after)) == set(weight_shapes(after.config))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    write_checkpoint(tmp_path)
    files = resolve(str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for attempt in (lambda: resolve(str(tmp_path)), lambda: load_weights(files)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*(cut|truncated)"):
            attempt()


@pytest.mark.parametrize("junk", [b"\xff" * 40, b'{"a": 3}', b'{"a": {"dtype": "BF16", "shape": [2]}}', b"[]"])
def test_a_garbled_header_is_named(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(junk).to_bytes(8, "little") + junk)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        read_header(path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        resolve(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("model", ["smollm", "tiny-x", "./nowhere", "/nowhere/at/all", ""])
def test_unknown_models_list_the_choices(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownName, match=r"no model .*smollm2-135m.*owner/name"):
        locate(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is a file"):
        locate(str(tmp_path / "model.gguf"))


def test_bfloat16_rounding_is_torchs() -> None:
    random = np.random.default_rng(0)
    numbers = random.standard_normal(10000).astype(np.float32) * np.float32(10.0) ** random.integers(-30, 30, 10000)
    numbers = np.concatenate([numbers, np.float32([0.0, -0.0, 1.00390625, 1.01171875])]).astype(np.float32)
    wanted = torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(to_bfloat16(numbers), wanted)


def test_tiny_tensors_survive_a_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", tiny_tensors(0), metadata={"format": "pt"})
    from safetensors.torch import load_file

    loaded = load_file(tmp_path / "t.safetensors")
    weights = load_weights(resolve("tiny"), "bfloat16")
    assert set(loaded) == set(weights) and all(torch.equal(loaded[key], one) for key, one in weights.items())
