"""EAGLE-3 heads on disk: what is written is what is read, and what is wrong is refused by name."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from eagle3_reference import CONFIG, HEAD, TARGET
from safetensors.torch import load_file, save_file

from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.model.tiny import tiny_config
from pdspec.spec.eagle3.checkpoint import load_head, random_head, save_head
from pdspec.spec.eagle3.config import Eagle3Config, default_fused_layers
from pdspec.spec.headfile import check_target, dequantise, quantise
from pdspec.spec.heads import TargetIdentity

MADE_FOR = TargetIdentity.of(TARGET, content_hash="c0", tokenizer_hash="t0")
MADE = replace(HEAD, target=MADE_FOR, card={"steps": 12})


@pytest.fixture
def folder(tmp_path):
    save_head(tmp_path / "head", MADE)
    return tmp_path / "head"


def edit(folder, change) -> None:
    """Rewrites the stored tensors after ``change(tensors)``."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_float_head_comes_back_as_it_was(folder):
    head = load_head(folder)
    assert head.config == CONFIG and head.target == MADE_FOR and head.card == {"steps": 12}
    assert torch.equal(head.target_ids, HEAD.target_ids)
    assert head.tensors.keys() == HEAD.tensors.keys()
    assert all(torch.equal(head.tensors[name], HEAD.tensors[name]) for name in HEAD.tensors)
    assert head.fingerprint() == HEAD.fingerprint()


def test_names_and_offsets_are_those_of_the_papers_authors(folder):
    stored = load_file(folder / "model.safetensors")
    assert {"fc.weight", "midlayer.hidden_norm.weight", "norm.weight", "lm_head.weight"} <= stored.keys()
    assert stored["d2t"].dtype == torch.int64 and stored["t2d"].dtype == torch.bool
    assert torch.equal(torch.arange(CONFIG.draft_vocab_size) + stored["d2t"], HEAD.target_ids)
    assert stored["t2d"].nonzero()[:, 0].tolist() == HEAD.target_ids.tolist()
    assert stored["midlayer.self_attn.q_proj.weight"].shape == (64, 2 * TARGET.hidden_size)


def test_int8_keeps_half_a_step_per_row_and_is_small(folder, tmp_path):
    save_head(tmp_path / "small", MADE, int8=True)
    head, stored = load_head(tmp_path / "small"), load_file(tmp_path / "small" / "model.safetensors")
    for name, exact in HEAD.tensors.items():
        if exact.dim() == 1:
            assert torch.equal(head.tensors[name], exact)
            continue
        assert stored[name].dtype == torch.int8 and stored[f"{name}_scale"].shape == exact.shape[:1]
        half_step = exact.abs().amax(1, keepdim=True) / 127 / 2
        assert bool(((head.tensors[name] - exact).abs() <= half_step * 1.001).all())
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert size < 0.3 * (folder / "model.safetensors").stat().st_size
    save_head(tmp_path / "again", head, int8=True)
    assert load_head(tmp_path / "again").fingerprint() == head.fingerprint() != HEAD.fingerprint()


def test_quantising_a_row_of_zeros():
    assert torch.equal(dequantise(*quantise(torch.zeros(2, 3))), torch.zeros(2, 3))


def test_half_precision_scales_and_the_speculators_names_are_read(folder, tmp_path):
    save_head(folder, MADE, int8=True)
    expected = load_head(folder)

    def change(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            tensors[name.replace("midlayer.", "layers.0.")] = tensor.half() if name.endswith("_scale") else tensor
        tensors["embed_tokens.weight"] = torch.zeros(TARGET.vocab_size, TARGET.hidden_size)

    edit(folder, change)
    head = load_head(folder)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(head.tensors[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_head_over_the_whole_vocabulary_needs_no_map(tmp_path):
    head = random_head(Eagle3Config.for_target(TARGET, TARGET.vocab_size), 3)
    save_head(tmp_path, head)
    edit(tmp_path, lambda tensors: [tensors.pop(name) for name in ("d2t", "t2d")])
    assert torch.equal(load_head(tmp_path).target_ids, torch.arange(TARGET.vocab_size))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize("change, names", [
    (drop("fc.weight"), "fc.weight"),
    (drop("d2t"), "d2t"),
    (put("norm.weight", torch.ones(47)), "norm.weight"),
    (put("norm.weight", torch.full((48,), torch.nan)), "norm.weight"),
    (put("fc.weight", torch.zeros(48, 144, dtype=torch.int8)), "fc.weight"),
    (put("fc.weight_scale", torch.ones(48)), "fc.weight"),
    (put("d2t", torch.zeros(60, dtype=torch.int64) - 1), "d2t"),
    (put("d2t", 5 - torch.arange(60)), "d2t"),
    (put("d2t", torch.zeros(59, dtype=torch.int64)), "d2t"),
    (put("t2d", torch.ones(200, dtype=torch.bool)), "t2d"),
    (put("midlayer.extra.weight", torch.ones(3)), "midlayer.extra.weight"),
])
def test_wrong_tensors_are_refused_by_name(folder, change, names):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=names):
        load_head(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 4000, -1])
def test_a_cut_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_head(folder)


def test_missing_and_garbled_files_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_head(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_head(folder)


@pytest.mark.parametrize("values, names", [
    ({"hidden_size": 64}, r"asks for"),
    ({"draft_vocab_size": 300}, "draft_vocab_size"),
    ({"num_attention_heads": 3}, "num_heads"),
    ({"num_hidden_layers": 2}, "one layer"),
    ({"rms_norm_eps": None}, "damaged"),
    ({"pdspec": {"format": 1, "fused_layers": [2, 2, 5]}}, "fused_layers"),
])
def test_a_config_that_cannot_be_is_refused(folder, values, names):
    edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=names):
        load_head(folder)


@pytest.mark.parametrize("values, names", [
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"pdspec": None, "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
      "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, "layer_ids"),
    ({"pdspec": {"format": 9}}, "format 9"),
])
def test_variants_that_are_not_built_are_refused_not_approximated(folder, values, names):
    edit_config(folder, **values)
    with pytest.raises(ConfigError, match=names):
        load_head(folder)


@pytest.mark.parametrize("flags", [{"fc_norm": True}, {"norm_output": True}, {"fc_norm": True, "norm_output": True}])
def test_heads_of_eagle_3_1_come_back_with_their_norms(tmp_path, flags):
    head = random_head(Eagle3Config.for_target(TARGET, 60, **flags), 1)
    levels = {f"fc_norm.{level}.weight" for level in range(3)} if flags.get("fc_norm") else set()
    assert head.tensors.keys() == HEAD.tensors.keys() | levels
    assert head.fingerprint() != HEAD.fingerprint()
    save_head(tmp_path, head, int8=True)
    values = json.loads((tmp_path / "config.json").read_text())
    assert {name: values.get(name, False) for name in ("fc_norm", "norm_output")} == {
        "fc_norm": False, "norm_output": False, **flags,
    }
    found = load_head(tmp_path)
    assert found.config == head.config
    assert all(torch.equal(found.tensors[name], head.tensors[name]) for name in levels)
    edit_config(tmp_path, **dict.fromkeys(flags, None), eagle_config=flags)
    assert load_head(tmp_path).config == head.config
    if levels:
        edit(tmp_path, lambda tensors: tensors.pop("fc_norm.1.weight"))
        with pytest.raises(CheckpointError, match=r"fc_norm\.1\.weight"):
            load_head(tmp_path)


def test_a_public_head_fuses_the_default_layers_and_cannot_vouch_for_its_target(folder, caplog):
    edit_config(folder, pdspec=None)
    head = load_head(folder, 30)
    assert head.config.fused_layers == (2, 15, 27) and head.target is None
    with caplog.at_level(logging.WARNING):
        assert not check_target(head, MADE_FOR, "here")
    assert "which target" in caplog.text
    with pytest.raises(Incompatible, match="content_hash"):
        check_target(head, MADE_FOR, "here", strict=True)
    with pytest.raises(Incompatible, match="hidden_size = 48, the target 64"):
        check_target(head, TargetIdentity.of(tiny_config("x"), content_hash="", tokenizer_hash=""), "here")


def test_the_right_target_is_taken_without_a_word(caplog):
    with caplog.at_level(logging.WARNING):
        assert check_target(MADE, MADE_FOR, "here", strict=True)
    assert not caplog.text


def test_another_geometry_or_tokenizer_is_refused_with_both_values():
    wide = TargetIdentity.of(replace(TARGET, num_layers=9), content_hash="c0", tokenizer_hash="t0")
    with pytest.raises(Incompatible, match=r"geometry\.num_layers = 8.* 9"):
        check_target(MADE, wide, "here")
    with pytest.raises(Incompatible, match="tokenizer_hash = 't0'.* 't1'"):
        check_target(MADE, replace(MADE_FOR, tokenizer_hash="t1"), "here")


def test_other_content_of_the_same_geometry_warns_and_strict_refuses(caplog):
    other = replace(MADE_FOR, content_hash="c1")
    with caplog.at_level(logging.WARNING):
        assert not check_target(MADE, other, "here")
    assert "c0" in caplog.text and "c1" in caplog.text
    with pytest.raises(Incompatible, match="c0.*c1"):
        check_target(MADE, other, "here", strict=True)


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        save_head(tmp_path / "file" / "head", MADE)


def test_random_heads_are_the_same_for_the_same_seed():
    assert random_head(CONFIG, 1).fingerprint() == HEAD.fingerprint() != random_head(CONFIG, 2).fingerprint()


@pytest.mark.parametrize("layers, fused", [(30, (2, 15, 27)), (7, (2, 3, 4)), (4, (1, 2, 3)), (3, (0, 1, 2))])
def test_fused_layers(layers, fused):
    assert default_fused_layers(layers) == fused


def test_two_layers_cannot_be_fused():
    with pytest.raises(ConfigError, match="2 layers"):
        default_fused_layers(2)
