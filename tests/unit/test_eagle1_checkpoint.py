"""EAGLE-1 heads on disk, public ones and ours, and how the families eagle1 and eagle2 find and set them up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from eagle1_reference import CONFIG, HEAD
from eagle3_reference import TARGET
from safetensors.torch import load_file, save_file

from pdspec.cache.paged import PagedCache
from pdspec.errors import CheckpointError, ConfigError
from pdspec.model.files import ModelFiles
from pdspec.model.loader import load_weights
from pdspec.model.ops import TorchOps
from pdspec.model.runner import Runner
from pdspec.model.tiny import tiny_config
from pdspec.spec import heads
from pdspec.spec.eagle1.checkpoint import load_head, random_head, save_head
from pdspec.spec.eagle1.config import Eagle1Config
from pdspec.spec.family import Parts, Setting
from pdspec.spec.heads import TargetIdentity
from pdspec.spec.registry import draft_groups, make_drafter

MADE_FOR = TargetIdentity.of(TARGET, content_hash="c0", tokenizer_hash="t0")
TINY = tiny_config("tiny")
FILES = ModelFiles(name="tiny-0", path=None, config=TINY, content_hash="c0", tokenizer_hash="t0")


@pytest.fixture
def folder(tmp_path):
    save_head(tmp_path / "head", replace(HEAD, target=MADE_FOR, card={"steps": 3}))
    return tmp_path / "head"


@pytest.fixture
def public(tmp_path):
    """As SafeAILab's are: a pickle with the embedding beside the head, a Llama config without our section."""
    folder = tmp_path / "public"
    folder.mkdir()
    head = random_head(Eagle1Config.for_target(TARGET, TARGET.vocab_size), 4)
    embedding = {"embed_tokens.weight": torch.zeros(TARGET.vocab_size, TARGET.hidden_size)}
    torch.save({**{name: tensor.half() for name, tensor in head.tensors.items()}, **embedding},
               folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1,
        "hidden_size": TARGET.hidden_size, "num_attention_heads": TARGET.num_heads, "head_dim": TARGET.head_dim,
        "num_key_value_heads": TARGET.num_kv_heads, "intermediate_size": TARGET.intermediate_size,
        "vocab_size": TARGET.vocab_size, "rms_norm_eps": TARGET.rms_norm_eps, "rope_scaling": None,
    }))
    return folder, head


def edit(folder, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_float_head_comes_back_as_it_was(folder):
    head = load_head(folder)
    assert head.config == CONFIG and head.target == MADE_FOR and head.card == {"steps": 3}
    assert torch.equal(head.target_ids, HEAD.target_ids)
    assert all(torch.equal(head.tensors[name], HEAD.tensors[name]) for name in HEAD.tensors)
    assert head.fingerprint() == HEAD.fingerprint() != random_head(CONFIG, 2).fingerprint()


def test_names_and_shapes_are_those_of_the_papers_authors(folder):
    stored = load_file(folder / "model.safetensors")
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"]
    assert stored.keys() == {"fc.weight", "fc.bias", "d2t", "t2d", *(f"layers.0.{name}.weight" for name in layer)}
    assert stored["fc.weight"].shape == (TARGET.hidden_size, 2 * TARGET.hidden_size)
    assert stored["layers.0.self_attn.q_proj.weight"].shape == (64, TARGET.hidden_size)
    assert torch.equal(torch.arange(60) + stored["d2t"], HEAD.target_ids)


def test_int8_keeps_half_a_step_per_row(tmp_path):
    save_head(tmp_path, HEAD, int8=True)
    stored, head = load_file(tmp_path / "model.safetensors"), load_head(tmp_path)
    for name, tensor in HEAD.tensors.items():
        if tensor.dim() == 2:
            assert stored[name].dtype == torch.int8
            assert ((head.tensors[name] - tensor).abs() <= 0.51 * stored[f"{name}_scale"][:, None]).all()
        else:
            assert torch.equal(head.tensors[name], tensor)


def test_a_head_over_the_whole_vocabulary_and_without_bias(tmp_path):
    head = random_head(Eagle1Config.for_target(TARGET, TARGET.vocab_size, bias=False), 3)
    save_head(tmp_path, head)
    assert not {"d2t", "t2d", "fc.bias"} & load_file(tmp_path / "model.safetensors").keys()
    found = load_head(tmp_path)
    assert found.config == head.config and found.target_ids.tolist() == list(range(TARGET.vocab_size))


def test_a_public_head_is_read_from_its_pickle_and_has_a_bias_unless_told(public):
    folder, head = public
    found = load_head(folder)
    assert found.config == head.config and found.config.bias and found.target is None
    assert all(torch.equal(found.tensors[name], head.tensors[name].half().float()) for name in head.tensors)
    edit_config(folder, bias=False)
    with pytest.raises(CheckpointError, match=r"fc\.bias .*no place in an EAGLE-1 head"):
        load_head(folder)


def test_a_pickle_that_holds_more_than_tensors_is_refused(public):
    folder, _ = public
    for content in ({"fc.weight": folder}, {"fc.weight": 3}, [1, 2]):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model\.bin"):
            load_head(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"cannot read .*pytorch_model\.bin"):
        load_head(folder)


@pytest.mark.parametrize("change, names", [
    (lambda t: t.pop("fc.bias"), r"lacks the tensor fc\.bias"),
    (lambda t: t.update({"fc.weight": t["fc.weight"][:, :-16].contiguous()}), r"fc\.weight .*asks for"),
    (lambda t: t["layers.0.mlp.up_proj.weight"].fill_(torch.nan), r"up_proj.*not finite"),
    (lambda t: t.update({"layers.0.input_layernorm.weight": torch.ones(48)}), r"layers\.0\.input_layernorm.*no place"),
    (lambda t: t.pop("d2t"), "d2t"),
])
def test_wrong_tensors_are_refused_by_name(folder, change, names):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=names):
        load_head(folder)


@pytest.mark.parametrize("values, names", [
    ({"mlp_bias": True}, "mlp_bias"),
    ({"attention_bias": True}, "attention_bias"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"num_hidden_layers": 2}, "one layer"),
    ({"num_attention_heads": 3}, "num_heads"),
    ({"rms_norm_eps": None}, "damaged"),
])
def test_what_cannot_be_run_is_refused_not_approximated(folder, values, names):
    edit_config(folder, **values)
    with pytest.raises((CheckpointError, ConfigError), match=names):
        load_head(folder)


@pytest.mark.parametrize("rope", [
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
])
def test_rope_rules_are_read_under_their_older_and_newer_keys(folder, rope):
    edit_config(folder, **rope)
    config = load_head(folder).config
    assert (config.rope_theta, config.rope_scaling) == (500.0, {"rope_type": "linear", "factor": 4.0})


# --- the families ----------------------------------------------------------------------------------------------------


def make(name, heads, **options):
    setting = Setting(target=FILES, dtype="float32", heads=heads, options=options)
    ops = TorchOps(torch.device("cpu"))
    cache = PagedCache((TINY.target_group("float32"), *draft_groups([name], setting)), 8, 16)
    runner = Runner(TINY, load_weights(FILES, "float32"), ops=ops, dtype="float32")
    return make_drafter(name, setting, Parts(ops=ops, cache=cache, runner=runner))


def test_eagle_2_takes_the_head_of_eagle_1_unless_it_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "SHIPPED_HEADS", tmp_path)
    with pytest.raises(ConfigError, match=r"heads\.eagle1"):
        make("eagle2", {})
    made_for = TargetIdentity.of(TINY, content_hash="c0", tokenizer_hash="t0")
    save_head(tmp_path / "eagle1-tiny", random_head(Eagle1Config.for_target(TINY, 40), 7, made_for))
    shipped, own = make("eagle2", {}), make("eagle2", {"eagle2": "random:1"})
    of_eagle1 = make("eagle2", {"eagle1": "random:1"})
    assert shipped.groups[0].name == "draft/eagle2" and shipped.target_matches
    assert own.fingerprint() == of_eagle1.fingerprint() != shipped.fingerprint()
    assert own.fingerprint() != make("eagle1", {"eagle1": "random:1"}).fingerprint()


def test_options_are_set_by_family_and_refused_by_name():
    drafter = make("eagle2", {"eagle2": "random:1"}, **{
        "eagle2:stable_kv": "false", "eagle2:first_token_padding": "true", "eagle2:threshold": "0.25",
    })
    assert not drafter.stable_kv and drafter.threshold == 0.25 and drafter.rows_at(5) == {"draft/eagle2": 6}
    default = make("eagle2", {"eagle2": "random:1"})
    assert default.stable_kv and default.threshold == 0 and default.rows_at(5) == {"draft/eagle2": 5}
    for name, option, value in (("eagle1", "stable_kv", "no"), ("eagle1", "first_token_padding", ""),
                                ("eagle2", "threshold", "2"), ("eagle2", "threshold", "x")):
        with pytest.raises(ConfigError, match=rf"options\.{name}:{option}"):
            make(name, {name: "random:1"}, **{f"{name}:{option}": value})
    with pytest.raises(ConfigError, match="eagle1:threshold"):
        make("eagle1", {"eagle1": "random:1"}, **{"eagle1:threshold": "0.1"})
