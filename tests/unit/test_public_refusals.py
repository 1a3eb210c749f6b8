"""Published checkpoints that do not fit: what is refused, under the key that the file has, and with the file."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_heads import EAGLES, FILES, MEDUSAS, TARGET, Published, make
from published_mtp import MTPS

from pdspec.errors import CheckpointError, ConfigError, Incompatible
from pdspec.model.ops import TorchOps
from pdspec.spec.formats import recognise

PUBLISHED = {**EAGLES, **MEDUSAS, **MTPS}


@pytest.fixture(params=PUBLISHED)
def published(request) -> Published:
    return PUBLISHED[request.param]


def refusal(published: Published, folder: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError, Incompatible)) as found:
        make(published.setting(folder), TorchOps(torch.device("cpu")))
    return str(found.value)


def file_of(published: Published, folder: Path) -> str:
    return str(folder / ("model-00002-of-00002.safetensors" if published.inside else published.file))


def test_a_key_that_is_missing_misshapen_or_too_much_is_named_with_its_file(tmp_path, published):
    needed = [name for name in published.weights if not name.startswith(("d2t", "t2d")) and "embed" not in name
              and "shared_head.head" not in name]  # fmt: skip
    counted = published.family == "medusa"  # its output matrix says how many blocks there are
    for index, key in enumerate((needed[0], needed[len(needed) // 2], needed[-2 if counted else -1])):
        message = refusal(published, published.write(tmp_path / f"without-{index}", **{key: None}))
        assert key in message or "experts." in key or (counted and "are expected" in message)
        assert str(tmp_path) in message
        folder = published.write(tmp_path / f"wrong-{index}", **{key: published.weights[key].float()[..., :-1]})
        message = refusal(published, folder)
        assert (key in message and file_of(published, folder) in message) or (counted and "config.json" not in key)
    beside = needed[0].rsplit(".", 2)[0]
    folder = published.write(tmp_path / "more", **{f"{beside}.extra.weight": torch.ones(3)})
    assert f"{beside}.extra.weight in {file_of(published, folder)} has no place" in refusal(published, folder)
    damaged = {needed[0]: torch.full_like(published.weights[needed[0]].float(), torch.nan)}
    folder = published.write(tmp_path / "nan", **damaged)
    assert f"{needed[0]} in {file_of(published, folder)} is not finite" in refusal(published, folder)


@pytest.mark.parametrize(("change", "field"), [
    ({"hidden_size": 80}, "hidden_size"), ({"vocab_size": 288}, "vocab_size"),
])  # fmt: skip
def test_a_head_of_another_target_is_refused_with_both_values(tmp_path, published, change, field):
    from pdspec.spec.headfile import check_target

    folder = published.write(tmp_path)
    (name,) = published.setting(folder).heads
    module = __import__(f"pdspec.spec.{name}.family", fromlist=["family"])
    opened = (module.open_heads if name == "medusa" else module.open_head)(str(folder), published.setting(folder))
    other = replace(FILES, config=replace(TARGET, **change))
    with pytest.raises(Incompatible, match=rf"the head in {folder} has {field} = \d+, the target {change[field]}"):
        check_target(opened, replace(published.setting(folder), target=other).identity, str(folder))
    assert not check_target(opened, published.setting(folder).identity, str(folder))
    if name == "mtp":
        deeper = replace(FILES, config=replace(TARGET, num_layers=5))
        with pytest.raises(Incompatible, match="num_layers = 4, the target 5"):
            check_target(opened, replace(published.setting(folder), target=deeper).identity, str(folder))


def test_a_config_of_another_size_than_the_tensors_is_refused(tmp_path):
    for name in ("SafeAILab EAGLE-1", "SafeAILab EAGLE-3", "DeepSeek-V3", "Qwen3-Next"):
        published = PUBLISHED[name]
        config = {**published.config, "hidden_size": 80, "head_dim": 16}
        folder = replace(published, config=config).write(tmp_path / name)
        message = refusal(published, folder)
        assert "config.json asks for" in message and file_of(published, folder) in message


class Payload:
    """What a pickle may do when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["SafeAILab EAGLE-1", "SafeAILab EAGLE-3", "Medusa .pt"])
def test_a_pickle_runs_nothing(tmp_path, name):
    published = PUBLISHED[name]
    folder = published.write(tmp_path / "head")
    key = next(iter(published.weights))
    torch.save({**published.weights, key: Payload(tmp_path / "ran")}, folder / published.file)
    assert f"cannot read {folder / published.file}: it holds more than tensors" in refusal(published, folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / published.file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_of_a_target_s_checkpoint_only_the_files_with_modules_are_opened(tmp_path):
    """``write`` leaves the other shard out. A shard that the modules need is missed by name, a lost one, too."""
    published = MTPS["Qwen3-Next"]
    folder = published.write(tmp_path)
    make(published.setting(folder), TorchOps(torch.device("cpu")))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.fc.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in refusal(published, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(published, folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "has none of model.safetensors, pytorch_model.bin" in refusal(published, folder)


def test_a_head_of_another_family_is_called_by_its_name(tmp_path):
    cases = {"speculators eagle3": "eagle1", "Medusa .pt": "mtp", "MiMo": "medusa", "speculators eagle": "mtp"}
    for name, family in cases.items():
        published = PUBLISHED[name]
        folder = published.write(tmp_path / name)
        row = recognise(published.config, published.family, folder)
        message = refusal(replace(published, family=family), folder)
        assert f"is a {row.name} checkpoint, for heads.{published.family}" in message and str(folder) in message
    with pytest.raises(CheckpointError, match=r"none that is known; medusa reads pdspec, Medusa"):
        recognise({}, "medusa", "here")


@pytest.mark.parametrize(("name", "changes", "names"), [
    ("speculators eagle", {"layernorms": True}, "layernorms"),
    ("speculators eagle3", {"norm_before_residual": None}, "norm_before_residual"),
    ("speculators eagle3", {"fc_norm": True, "norm_before_fc": True}, "fc_norm with norm_before_fc"),
    ("SpecForge", {"eagle_aux_hidden_state_layer_ids": [0, 2, 1]}, "eagle_aux_hidden_state_layer_ids"),
    ("SafeAILab EAGLE-3", {"target_hidden_size": 128}, "as wide as the target"),
    ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method to 'greedy'"),
    ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("DeepSeek-V3", {"topk_group": 5}, "topk_group=5 of n_group=4"),
    ("Qwen3-Next", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 of 8"),
    ("MiMo", {"use_sliding_window": True}, "sliding_window"),
    ("speculators mtp of Qwen3", {"transformer_layer_config": 3}, "damaged"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_by_its_config_key(tmp_path, name, changes, names):
    published = PUBLISHED[name]
    folder = replace(published, config={**published.config, **changes}).write(tmp_path)
    assert names in refusal(published, folder)
