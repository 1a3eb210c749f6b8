"""The exported GGUF file holds the very weights: converted back, they have the pinned hash."""

from __future__ import annotations

import json

import pytest
from tiny_folder import save_tiny

from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.files import resolve
from pdspec.model.fingerprint import array_tensors_hash
from pdspec.model.gguf_convert import convert
from pdspec.model.gguf_export import export, export_folder
from pdspec.model.tokenizer import load_tokenizer


@pytest.mark.model
def test_an_exported_model_converts_back_to_the_same_bits(tmp_path):
    files = resolve("smollm2-135m")
    back = tmp_path / "back"
    back.mkdir()
    tensors = convert(export(files, tmp_path / "model.gguf"), back)
    assert array_tensors_hash(tensors) == files.content_hash
    ours, theirs = load_tokenizer("smollm2-135m"), load_tokenizer(str(back))
    assert ours.fingerprint() == theirs.fingerprint()
    chat = [{"role": "user", "content": "x"}]
    assert ours.render_chat(chat) == theirs.render_chat(chat)


def test_other_decoders_are_refused_and_nothing_is_left(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    files = resolve(save_tiny(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    with pytest.raises(CheckpointError, match="plain RoPE"):
        export(resolve(files.name), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="no Llama checkpoint"):
        export(resolve("tiny"), tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_folder_is_copied_once(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    files = resolve(save_tiny(folder))
    copy = resolve(str(export_folder(files, tmp_path / "copy")))
    assert copy.content_hash == files.content_hash
    with pytest.raises(ConfigError, match="cannot write"):
        export_folder(files, tmp_path / "copy")
