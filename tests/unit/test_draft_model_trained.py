"""A trained draft model: what its file holds, what it borrows of the target, and which files are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from dense_llama import DenseLlama
from safetensors.torch import load_file, save_file

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.model.files import resolve
from pdspec.model.loader import load_weights
from pdspec.spec.draft_model.trained import load_trained, own_shapes, save_trained
from pdspec.spec.headfile import StoredHead
from pdspec.spec.heads import TargetIdentity
from pdspec.train.draft_model import geometry_of, new_tensors
from pdspec.types import GenerateRequest, SamplingParams

FILES = resolve("tiny")
TARGET = FILES.config
IDS = torch.arange(3, TARGET.vocab_size, 2)  # every second token


def make(folder, *, layers=2, channels=0, **identity):
    config = geometry_of(TARGET, layers, channels or TARGET.intermediate_size)
    tensors = new_tensors(config, TARGET, load_weights(FILES, "float32"))
    known = TargetIdentity.of(TARGET, content_hash=FILES.content_hash, tokenizer_hash=FILES.tokenizer_hash)
    head = StoredHead(config=config, tensors=tensors, target_ids=IDS, target=replace(known, **identity), card={"a": 1})
    save_trained(folder, head)
    return head


def generator(folder):
    return LocalGenerator(WorkerConfig(
        model="tiny", dtype="float32", drafters=("none", "draft_model"), drafter="draft_model", cache_tokens=2048,
        heads={"draft_model": str(folder)}, threads=1, tree="chain(3)",
    ))  # fmt: skip


def test_the_file_holds_layers_and_ids_and_nothing_of_the_targets(tmp_path):
    head = make(tmp_path)
    stored, found = load_file(tmp_path / "model.safetensors"), load_trained(tmp_path)
    assert not any("embed_tokens" in name or "lm_head" in name for name in stored)
    assert stored["model.layers.1.mlp.up_proj.weight"].dtype == torch.int8
    assert torch.equal(found.target_ids, IDS) and found.card == {"a": 1}
    assert found.tensors.keys() == own_shapes(head.config).keys()
    for name, tensor in head.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, atol=float(tensor.abs().max()) / 200, rtol=0)
    assert found.fingerprint() == load_trained(tmp_path).fingerprint()
    assert found.fingerprint() != replace(found, target_ids=IDS + 1).fingerprint()


def test_new_layers_are_the_targets_first_and_last_with_the_channels_that_weigh_most():
    weights = load_weights(FILES, "float32")
    config = geometry_of(TARGET, 2, TARGET.intermediate_size // 2)
    tensors = new_tensors(config, TARGET, weights)
    last = TARGET.num_layers - 1
    for layer, source in ((0, 0), (1, last)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(tensors[name], weights[f"model.layers.{source}.self_attn.q_proj.weight"])
    gate, up = (weights[f"model.layers.{last}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    down = weights[f"model.layers.{last}.mlp.down_proj.weight"]
    kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(config.intermediate_size).indices.sort().values
    assert torch.equal(tensors["model.layers.1.mlp.gate_proj.weight"], gate[kept])
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], down[:, kept])


def test_a_chain_is_what_the_layers_say_over_the_targets_rows(tmp_path):
    """Against a dense recompute in float64: embedding and output rows are the target's, ids those of the file."""
    make(tmp_path)
    head, weights = load_trained(tmp_path), load_weights(FILES, "float32")
    embedding = weights["model.embed_tokens.weight"]
    output = weights.get("lm_head.weight", embedding)
    config = replace(head.config, tie_embeddings=False)
    dense = DenseLlama(config, {**head.tensors, "model.embed_tokens.weight": embedding, "lm_head.weight": output})
    local = generator(tmp_path)
    asked = GenerateRequest(request_id="a", prompt_ids=tuple(range(60, 80)), drafter="draft_model", trace=True,
                            sampling=SamplingParams(max_tokens=12, seed=1, ignore_eos=True))
    tokens, drafts = list(asked.prompt_ids), []
    for chunk in local.generate(asked):
        if chunk.trace is not None and len(chunk.trace.token_ids):
            path = list(tokens)
            for token in chunk.trace.token_ids:
                assert int(token) == int(IDS[int(dense(path)[1][-1][IDS].argmax())])
                path.append(int(token))
            drafts.append(len(chunk.trace.token_ids))
        tokens += chunk.token_ids
    assert len(drafts) > 2 and max(drafts) == 3
    local.resources.close()


@pytest.mark.parametrize("layers, channels, field", [(0, 0, "layers"), (99, 0, "layers"), (1, 10**6, "intermediate")])
def test_sizes_that_the_target_has_not(layers, channels, field):
    with pytest.raises(ConfigError) as caught:
        geometry_of(TARGET, layers, channels)
    assert caught.value.field == field


def test_another_target_is_refused(tmp_path):
    make(tmp_path, tokenizer_hash="other")
    with pytest.raises(Incompatible, match="tokenizer_hash"):
        generator(tmp_path)


@pytest.mark.parametrize("damage", ["no size", "no target", "an embedding", "a missing layer", "ids outside"])
def test_damaged_folders_are_refused_naming_what_is_wrong(tmp_path, damage):
    make(tmp_path)
    path, values = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(path)
    if damage == "no size":
        del values["draft_vocab_size"]
    elif damage == "no target":
        del values["pdspec"]["target"]
    elif damage == "an embedding":
        tensors["model.embed_tokens.weight"] = torch.zeros(TARGET.vocab_size, TARGET.hidden_size)
    elif damage == "a missing layer":
        del tensors["model.layers.1.self_attn.k_proj.weight"]
    else:
        tensors["d2t"] = tensors["d2t"] + TARGET.vocab_size
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(tensors, path)
    words = {"no size": "draft_vocab_size", "no target": "target", "an embedding": "embed_tokens",
             "a missing layer": "k_proj", "ids outside": "d2t"}  # fmt: skip
    with pytest.raises(CheckpointError, match=words[damage]):
        load_trained(tmp_path)
