"""MTP modules on disk: DeepSeek's keys there and back, what is refused, and what options choose."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from mtp_reference import EMBEDDING, LM_HEAD, TARGET, head_of
from safetensors.torch import load_file, save_file

from pdspec.cache.paged import PagedCache
from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.model.files import ModelFiles
from pdspec.model.ops import TorchOps
from pdspec.spec.family import Setting
from pdspec.spec.mtp import family
from pdspec.spec.mtp.checkpoint import load_head, random_head, save_head
from pdspec.spec.mtp.config import MtpConfig
from pdspec.spec.mtp.head import make_modules

LAYER = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
OWN = ("enorm", "hnorm", "eh_proj", "shared_head.norm")


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path):
    save_head(tmp_path, head_of(2))
    return tmp_path


@pytest.mark.parametrize("draft_vocab", [60, TARGET.vocab_size])
def test_there_and_back_under_deepseeks_keys(tmp_path, draft_vocab):
    head = head_of(2, draft_vocab)
    save_head(tmp_path, head)
    names = {f"model.layers.{8 + m}.{name}.weight" for m in range(2) for name in (*OWN, *LAYER)}
    reduced = {"d2t", "t2d"} if draft_vocab == 60 else set()
    assert load_file(tmp_path / "model.safetensors").keys() == names | reduced
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["num_hidden_layers"], values["num_nextn_predict_layers"]) == (8, 2)
    again = load_head(tmp_path)
    assert again.config == head.config and torch.equal(again.target_ids, head.target_ids)
    assert again.fingerprint() == head.fingerprint() != head_of(3, draft_vocab).fingerprint()


def test_int8_is_half_a_step_of_each_row_away(tmp_path):
    head = head_of(2)
    save_head(tmp_path, head, int8=True)
    stored, again = load_file(tmp_path / "model.safetensors"), load_head(tmp_path)
    for name, tensor in head.tensors.items():
        if tensor.dim() == 2:
            assert stored[name].dtype == torch.int8
            step = tensor.abs().amax(1, keepdim=True) / 127
            assert ((again.tensors[name] - tensor).abs() <= 0.5001 * step).all()
        else:
            assert torch.equal(again.tensors[name], tensor)
    assert again.fingerprint() != head.fingerprint()


def test_the_seed_names_the_head():
    config = MtpConfig.for_target(TARGET, 60, 2)
    assert random_head(config, 5).fingerprint() == random_head(config, 5).fingerprint()
    assert random_head(config, 5).fingerprint() != random_head(config, 6).fingerprint()


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.layers.9.eh_proj.weight"), "lacks the tensor model.layers.9.eh_proj.weight"),
    (lambda t: t.update({"model.layers.8.enorm.weight": torch.ones(7)}), "model.layers.8.enorm.weight .* is"),
    (lambda t: t.update({"model.layers.8.hnorm.weight": torch.full((48,), torch.nan)}), "hnorm.weight .* not finite"),
    (lambda t: t.update({"model.layers.10.enorm.weight": torch.ones(48)}), "model.layers.10.enorm.weight .* no place"),
    (lambda t: t.update({"model.layers.8.self_attn.q_norm.weight": torch.ones(16)}), "q_norm.weight .* no place"),
    (lambda t: t.update({"model.layers.8.embed_tokens.weight": torch.ones(3, 48)}), "embed_tokens.weight .* is"),
    (lambda t: t.pop("d2t"), "no d2t"),
])
def test_damaged_tensors_are_named(folder, change, message):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_head(folder)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"kv_lora_rank": 512}, CheckpointError, "qk_nope_head_dim"),
    ({"n_routed_experts": 256}, CheckpointError, "moe_intermediate_size"),
    ({"n_routed_experts": 256, "topk_method": "greedy"}, ConfigError, "topk_method to 'greedy'"),
    ({"quantization_config": {"quant_method": "fp8"}}, ConfigError, "quantization_config"),
    ({"attention_bias": True}, ConfigError, "attention_bias"),
    ({"num_nextn_predict_layers": 0}, CheckpointError, "num_nextn_predict_layers=0"),
    ({"num_nextn_predict_layers": None}, CheckpointError, "damaged"),
    ({"hidden_size": 40}, CheckpointError, "hidden_size=40"),
])
def test_what_is_no_such_module_is_refused(folder, changes, error, message):
    edit_config(folder, **changes)
    with pytest.raises(error, match=message):
        load_head(folder)


def modules_of(head):
    ops = TorchOps(torch.device("cpu"))
    groups = [head.config.cache_group(m, "float32") for m in (1, 2)]
    return make_modules(head, 2, ops=ops, embedding=ops.pack(EMBEDDING), lm_head=ops.pack(LM_HEAD),
                        cache=PagedCache(tuple(groups), 4, 8), dtype="float32", max_positions=64)


def test_what_modules_share_with_the_target_may_be_repeated_but_not_differ(folder):
    shared = {"model.layers.8.embed_tokens.weight": EMBEDDING, "model.layers.8.shared_head.head.weight": LM_HEAD,
              "model.layers.9.shared_head.head.weight": LM_HEAD}
    edit(folder, lambda tensors: tensors.update({name: tensor.clone() for name, tensor in shared.items()}))
    assert len(modules_of(load_head(folder))) == 2
    for name, tensor in shared.items():
        other = tensor.clone()
        other[-1, -1] += 1
        edit(folder, lambda tensors, name=name, other=other: tensors.update({name: other}))
        with pytest.raises(Incompatible, match=name):
            modules_of(load_head(folder))
        edit(folder, lambda tensors, name=name, tensor=tensor: tensors.update({name: tensor.clone()}))


def setting(folder="random:1", **options):
    files = ModelFiles(name="fake", path=None, config=TARGET, content_hash="c", tokenizer_hash="t")
    named = {f"mtp:{name}": value for name, value in options.items()}
    return Setting(target=files, dtype="bfloat16", heads={"mtp": str(folder)}, options=named)


def names(asked):
    return [group.name for group in family.groups(asked)]


def test_options_say_how_many_modules_serve(folder):
    assert names(setting()) == ["draft/mtp/0", "draft/mtp/1"]
    assert names(setting(modules="3")) == ["draft/mtp/0", "draft/mtp/1", "draft/mtp/2"]
    assert names(setting(reuse="true")) == names(setting(folder, modules="1")) == ["draft/mtp/0"]
    assert names(setting(folder)) == ["draft/mtp/0", "draft/mtp/1"]
    assert all(group.num_layers == 1 and group.dtype == "bfloat16" for group in family.groups(setting(folder)))
    with pytest.raises(ConfigError, match=r"mtp:modules is 3, the head has 2"):
        names(setting(folder, modules="3"))
    for options in ({"modules": "0"}, {"modules": "two"}, {"reuse": "yes"}):
        with pytest.raises(ConfigError, match="mtp:"):
            names(setting(**options))


def test_the_head_of_another_cache_is_refused():
    head = head_of(2)
    other = replace(head, config=replace(head.config, num_kv_heads=1, num_heads=4))
    ops = TorchOps(torch.device("cpu"))
    cache = PagedCache(tuple(head.config.cache_group(m, "float32") for m in (1, 2)), 4, 8)
    with pytest.raises(ValueError, match="where the module needs"):
        make_modules(other, 2, ops=ops, embedding=ops.pack(EMBEDDING), lm_head=ops.pack(LM_HEAD), cache=cache,
                     dtype="float32", max_positions=64)
