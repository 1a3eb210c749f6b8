"""Medusa heads on disk: ours and published ones; what is wrong is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdspec.cache.paged import PagedCache
from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.model.files import ModelFiles
from pdspec.model.loader import load_weights
from pdspec.model.ops import TorchOps
from pdspec.model.runner import Runner
from pdspec.model.tiny import tiny_config
from pdspec.spec.family import Parts, Setting
from pdspec.spec.heads import TargetIdentity
from pdspec.spec.medusa.checkpoint import load_heads, random_heads, save_heads
from pdspec.spec.medusa.config import MedusaConfig
from pdspec.spec.registry import make_drafter

TARGET = tiny_config("tiny")
FILES = ModelFiles(name="tiny-0", path=None, config=TARGET, content_hash="c0", tokenizer_hash="t0")
MADE_FOR = TargetIdentity.of(TARGET, content_hash="c0", tokenizer_hash="t0")
CONFIG = MedusaConfig.for_target(TARGET, 40, num_heads=3, num_layers=2)
HEADS = replace(random_heads(CONFIG, 1, MADE_FOR), card={"steps": 7})
PUBLIC = replace(CONFIG, draft_vocab_size=TARGET.vocab_size, own_lm_heads=True, num_layers=1)


@pytest.fixture
def folder(tmp_path):
    save_heads(tmp_path, HEADS)
    return tmp_path


def publish(folder, prefix="", name="medusa_lm_head.safetensors"):
    """As FasterDecoding does: a config that tells little, here too few heads, and tensors without a map."""
    tensors = {prefix + name: tensor for name, tensor in random_heads(PUBLIC, 2).tensors.items()}
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / name)
    (folder / "config.json").write_text(json.dumps(
        {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    ))


def make(folder, strict=False):
    torch.set_num_threads(1)
    ops = TorchOps(torch.device("cpu"))
    runner = Runner(TARGET, load_weights(FILES, "float32"), ops=ops, dtype="float32")
    setting = Setting(target=FILES, dtype="float32", heads={"medusa": str(folder)}, strict=strict)
    cache = PagedCache((TARGET.target_group("float32"),), 4, 16)
    return make_drafter("medusa", setting, Parts(ops=ops, cache=cache, runner=runner)), runner


def test_heads_come_back_as_they_were_under_medusa_s_names(folder):
    heads, stored = load_heads(folder), load_file(folder / "model.safetensors")
    assert heads.config == CONFIG and heads.target == MADE_FOR and heads.card == {"steps": 7}
    assert torch.equal(heads.target_ids, HEADS.target_ids)
    assert heads.tensors.keys() == HEADS.tensors.keys() == stored.keys() - {"d2t", "t2d"}
    assert all(torch.equal(heads.tensors[name], HEADS.tensors[name]) for name in HEADS.tensors)
    assert heads.fingerprint() == HEADS.fingerprint() != random_heads(CONFIG, 3).fingerprint()
    assert stored["2.1.linear.weight"].shape == (64, 64) and "0.2.weight" not in stored


def test_int8_is_near_and_has_another_fingerprint(tmp_path):
    save_heads(tmp_path, HEADS, int8=True)
    heads = load_heads(tmp_path)
    for name, exact in HEADS.tensors.items():
        step = exact.abs().max() / 127 if exact.dim() > 1 else 0.0
        assert bool(((heads.tensors[name] - exact).abs() <= step).all())
    assert heads.fingerprint() != HEADS.fingerprint()


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
def test_published_heads_are_counted_by_their_tensors(tmp_path, prefix):
    publish(tmp_path, prefix)
    heads = load_heads(tmp_path)
    assert heads.config == PUBLIC and heads.target is None
    assert torch.equal(heads.target_ids, torch.arange(TARGET.vocab_size))
    drafter, _ = make(tmp_path)
    assert drafter.num_heads == 3 and not drafter.target_matches
    hidden = torch.randn(2, 64)
    expected = hidden + torch.nn.functional.silu(
        hidden @ heads.tensors["1.0.linear.weight"].T + heads.tensors["1.0.linear.bias"]
    )
    torch.testing.assert_close(drafter.model.logits(hidden, 1), expected @ heads.tensors["1.1.weight"].T)
    with pytest.raises(Incompatible, match="content_hash"):
        make(tmp_path, strict=True)


def test_heads_without_an_output_of_their_own_use_the_target_s_rows(folder):
    drafter, runner = make(folder, strict=True)
    assert drafter.target_matches
    hidden = torch.randn(2, 64)
    expected = hidden
    for block in range(2):
        inner = expected @ HEADS.tensors[f"0.{block}.linear.weight"].T + HEADS.tensors[f"0.{block}.linear.bias"]
        expected = expected + torch.nn.functional.silu(inner)
    expected = expected @ runner.lm_head[HEADS.target_ids].T
    torch.testing.assert_close(drafter.model.logits(hidden, 0), expected, atol=1e-4, rtol=1e-4)


def edit(folder, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, names", [
    (lambda tensors: tensors.pop("1.0.linear.bias"), "1.0.linear.bias"),
    (lambda tensors: tensors.pop("d2t"), "d2t"),
    (lambda tensors: tensors.update({"0.0.linear.weight": torch.ones(64, 63)}), "0.0.linear.weight"),
    (lambda tensors: tensors.update({"0.0.linear.bias": torch.full((64,), torch.nan)}), "not finite"),
    (lambda tensors: tensors.update({"3.0.linear.bias": torch.ones(64)}), "3.0.linear.bias"),
])
def test_damaged_tensors_are_refused_by_name(folder, change, names):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=names):
        load_heads(folder)


@pytest.mark.parametrize("values, names", [
    ({"medusa_num_heads": 0}, "medusa_num_heads=0"),
    ({"medusa_num_heads": "many"}, "many"),
    ({"hidden_size": 7}, "hidden_size=7"),
    ({"draft_vocab_size": 1000}, "draft_vocab_size=1000"),
    ({"medusa_num_layers": -1}, "medusa_num_layers=-1"),
])
def test_senseless_geometry_is_refused(folder, values, names):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(CheckpointError, match=names):
        load_heads(folder)


def test_what_is_no_medusa_head_is_refused(tmp_path):
    publish(tmp_path)
    tensors = load_file(tmp_path / "medusa_lm_head.safetensors")
    save_file({"0.0.linear.weight": tensors["0.0.linear.weight"]}, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match="are expected"):
        load_heads(tmp_path)
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"cannot read .*medusa_lm_head\.pt: it holds more than tensors"):
        load_heads(tmp_path)
    with pytest.raises(ConfigError, match="heads.medusa"):
        make("")
