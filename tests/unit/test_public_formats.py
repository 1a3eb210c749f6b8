"""Published checkpoints: each format of ``formats.py`` loads under its own key names, computes what its equations say,
and drafts."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from published_heads import EAGLES, EMBEDDING, MEDUSAS, H, Published, V, make, target_weight, values
from published_mtp import MTPS
from safetensors.torch import load_file, save_file

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import PdspecError
from pdspec.model.batch import ForwardBatch
from pdspec.spec.formats import FORMATS, recognise
from pdspec.spec.protocol import HiddenRows
from pdspec.types import GenerateRequest, SamplingParams

PUBLISHED = {**EAGLES, **MEDUSAS, **MTPS}
ROWS = 21


def batch_of(tokens: np.ndarray) -> ForwardBatch:
    """Rows 0..R-1 of one sequence on pages out of order, each seeing those before it."""
    rows = np.arange(len(tokens), dtype=np.int32)
    return ForwardBatch(
        token_ids=tokens, positions=rows, sequence=np.zeros_like(rows), slots=rows, prefix_len=rows + 1,
        ancestors=np.empty((len(rows), 0), np.int32), page_table=np.array([[5, 2, 7]], np.int32),
        logit_rows=np.empty(0, np.int32),
    )  # fmt: skip


def hidden_of(published: Published, model, tokens: np.ndarray, features: torch.Tensor) -> torch.Tensor:
    """What the drafter's model gives the next rows."""
    if published.family == "medusa":
        return torch.stack([model.logits(features, head) for head in range(model.config.num_heads)], 1)
    if published.family == "eagle3":
        read = model.features(HiddenRows(start=0, captured=features, final=None))
    else:
        model = getattr(model, "modules", [model])[0]
        read = model.features(HiddenRows(start=0, captured=None, final=features))
    return model.forward(batch_of(tokens), read, np.arange(len(tokens), dtype=np.int32))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_head_computes_what_its_equations_say(tmp_path, name, ops):
    published, random = PUBLISHED[name], np.random.default_rng(3)
    tokens = random.integers(0, V, ROWS).astype(np.int32)
    shape = (ROWS, 3, H) if published.family == "eagle3" else (ROWS, H)
    features = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    drafter = make(published.setting(published.write(tmp_path)), ops)
    found = hidden_of(published, drafter.model, tokens, features)
    expected = published.hidden(published.embedding[tokens].double(), features.double())
    torch.testing.assert_close(found.double(), expected, atol=5e-5, rtol=1e-5)
    # a row of it shuffled, and a later row's hidden state, are not the same thing
    assert (expected[1:] - expected[:-1]).abs().max() > 0.1


def test_all_modules_of_a_series_are_read(tmp_path, native):
    """MiMo's second module is the first with its own weights."""
    published = MTPS["MiMo"]
    model = make(published.setting(published.write(tmp_path)), native).model
    assert len(model.modules) == 2
    swapped = {name.replace("mtp_layers.1.", "mtp_layers.0."): tensor
               for name, tensor in published.weights.items() if "mtp_layers.1." in name}
    other = make(published.setting(published.write(tmp_path / "other", **swapped)), native).model
    tokens = np.arange(ROWS, dtype=np.int32)
    features = torch.randn(ROWS, H, generator=torch.Generator().manual_seed(1))
    rows = np.arange(ROWS, dtype=np.int32)
    second = model.modules[1].forward(batch_of(tokens), features, rows)
    torch.testing.assert_close(other.modules[0].forward(batch_of(tokens), features, rows), second)
    assert (model.modules[0].forward(batch_of(tokens), features, rows) - second).abs().max() > 0.1


def test_layers_to_fuse_are_inputs_whatever_the_engine_calls_them(tmp_path, native):
    fused = {}
    for name in ("SafeAILab EAGLE-3", "SpecForge", "speculators eagle3"):
        drafter = make(EAGLES[name].setting(EAGLES[name].write(tmp_path / name)), native)
        fused[name] = drafter.model.config.fused_layers
    assert fused == {"SafeAILab EAGLE-3": (1, 2, 3), "SpecForge": (1, 3, 2), "speculators eagle3": (1, 3, 2)}


def test_an_embedding_of_its_own_is_used_and_a_copy_of_the_target_s_is_not_kept(tmp_path, native):
    same, own = EAGLES["SpecForge"], EAGLES["speculators eagle3"]
    copy = make(same.setting(same.write(tmp_path / "same")), native).model
    assert torch.equal(native.embed(copy.embedding, np.arange(V)), EMBEDDING)
    model = make(own.setting(own.write(tmp_path / "own")), native).model
    assert torch.equal(native.embed(model.embedding, np.arange(V)), own.embedding)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_head_may_be_kept_in_our_form(tmp_path, name):
    """All that sets it apart is in the config that we write."""
    published = PUBLISHED[name]
    family = published.family
    module = import_module(f"pdspec.spec.{family}.checkpoint")
    load, save = (getattr(module, f"{verb}_head{'s' if family == 'medusa' else ''}") for verb in ("load", "save"))
    more = (4,) if family == "eagle3" else ()
    head = load(published.write(tmp_path / "published"), *more)
    save(tmp_path / "ours", head)
    again = load(tmp_path / "ours", *more)
    assert again.config == head.config and torch.equal(again.target_ids, head.target_ids)
    assert again.tensors.keys() == head.tensors.keys()
    assert all(torch.equal(again.tensors[key], head.tensors[key]) for key in head.tensors)


# --- serving ------------------------------------------------------------------------------------------------------

BUNDLES = (
    ("SafeAILab EAGLE-1", "SafeAILab EAGLE-3", "Medusa .pt", "MiMo"),
    ("SafeAILab EAGLE-1 for Qwen2", "SpecForge", "Medusa safetensors, two blocks", "Qwen3-Next"),
    ("speculators eagle", "speculators eagle3", "DeepSeek-V3"),
    ("speculators eagle3 of Qwen3", "speculators mtp of Qwen3"),
    ("Qwen3.5",), ("speculators mtp of Qwen3-Next",),
)  # fmt: skip


def answers(local: LocalGenerator, drafters) -> dict[str, tuple[tuple[int, ...], int]]:
    """Tokens and drafted tokens of each drafter."""
    found = {}
    for name in drafters:
        sampling = SamplingParams(max_tokens=20, seed=4, temperature=0.8, ignore_eos=True)
        request = GenerateRequest(request_id=name, prompt_ids=tuple(range(40)), sampling=sampling, drafter=name)
        chunks = list(local.generate(request))
        assert chunks[-1].stats is not None
        drafted = chunks[-1].stats.drafted_tokens
        found[name] = tuple(token for chunk in chunks for token in chunk.token_ids), drafted
    return found


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("dtype", ["float32"])
def test_drafting_with_published_heads_changes_no_token(tmp_path, bundle, dtype):
    heads = {PUBLISHED[name].family: str(PUBLISHED[name].write(tmp_path / name)) for name in bundle}
    config = WorkerConfig(model="tiny", dtype=dtype, drafter="none", drafters=("none", *heads), heads=heads,
                          cache_tokens=2048, threads=1, chunk=16)
    local = LocalGenerator(config)
    found = answers(local, ("none", *heads))
    local.resources.close()
    assert {tokens for tokens, _ in found.values()} == {found["none"][0]}
    assert found["none"][1] == 0 and all(found[name][1] > 0 for name in heads)


def test_a_target_with_modules_inside_serves_and_drafts_with_them(tmp_path):
    """One folder is ``model`` and ``heads.mtp``; MiMo is a Qwen2 with modules beside its layers."""
    from tiny_folder import save_tiny

    save_tiny(tmp_path)
    published = MTPS["MiMo"]
    biases = {f"model.layers.{n}.self_attn.{letter}_proj.bias": values(f"{n}{letter}.bias", 64 if letter == "q" else 32)
              for n in range(4) for letter in "qkv"}  # fmt: skip
    whole = {**load_file(tmp_path / "model.safetensors"), **biases, **published.weights}
    save_file(whole, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(published.config))
    config = WorkerConfig(model=str(tmp_path), dtype="float32", drafter="none", drafters=("none", "mtp"),
                          heads={"mtp": str(tmp_path)}, cache_tokens=2048, threads=1)
    local = LocalGenerator(config)
    found = answers(local, ("none", "mtp"))
    local.resources.close()
    assert found["mtp"][0] == found["none"][0] and found["mtp"][1] > 0
    save_file({**whole, "model.layers.9.mlp.up_proj.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(PdspecError, match=r"model\.layers\.9\.mlp\.up_proj\.weight .*no place"):
        LocalGenerator(config)


def test_every_format_is_tested_and_told_of(tmp_path):
    rows = {recognise(published.config, published.family, name) for name, published in PUBLISHED.items()}
    assert rows == {row for row in FORMATS if row.name != "pdspec"}
    assert {name for bundle in BUNDLES for name in bundle} == set(PUBLISHED)
    table = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for row in FORMATS:
        assert f"| {row.name} | {row.family}" in table or (row.name == "pdspec" and "| pdspec | all" in table)
        assert all(f"`{name}`" in table for name in row.files)
        assert all(f"`{theirs}" in table for theirs, ours in row.renames if theirs and theirs != ours), row.name


def test_the_tiny_target_s_output_head_is_what_deepseek_repeats():
    assert torch.equal(MTPS["DeepSeek-V3"].weights["model.layers.4.shared_head.head.weight"],
                       target_weight("lm_head.weight"))
