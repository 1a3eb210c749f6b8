"""What every drafter of the registry promises to the engines, whatever its family."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from pdspec.cache.paged import PagedCache
from pdspec.errors import ConfigError, Incompatible, UnknownName
from pdspec.model.files import ModelFiles
from pdspec.model.loader import load_weights
from pdspec.model.ops import TorchOps
from pdspec.model.runner import Runner
from pdspec.model.tiny import tiny_config
from pdspec.spec import heads
from pdspec.spec.eagle3.checkpoint import random_head, save_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.family import Parts, Setting
from pdspec.spec.heads import TargetIdentity
from pdspec.spec.model_free import guessed_chain
from pdspec.spec.ngram.drafter import NgramDrafter
from pdspec.spec.registry import NAMES, draft_groups, make_drafter
from pdspec.study import drafter_contract
from pdspec.study.drafter_contract import World

TARGET = tiny_config("tiny")
FILES = ModelFiles(name="tiny-0", path=None, config=TARGET, content_hash="c0", tokenizer_hash="t0")
OPS = TorchOps(torch.device("cpu"))
HEADS = ("medusa", "eagle1", "eagle2", "eagle3", "mtp", "draft_model", "combined")
RANDOM = dict.fromkeys(HEADS, "random:3")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@cache
def target(dtype):
    return Runner(TARGET, load_weights(FILES, dtype), ops=OPS, dtype=dtype)


@cache
def world(dtype):
    return World(setting=setting(dtype=dtype), ops=OPS, runner=target(dtype))


def setting(*, dtype="float32", heads=RANDOM, strict=False, **changes):
    return Setting(target=replace(FILES, **changes), dtype=dtype, heads=heads, strict=strict)


def make(name, pages=None, **changes):
    asked = setting(**changes)
    if pages is None:
        pages = PagedCache((TARGET.target_group(asked.dtype), *draft_groups([name], asked)), 200, 16)
    return make_drafter(name, asked, Parts(ops=OPS, cache=pages, runner=target(asked.dtype))), pages


@pytest.mark.parametrize("dtype", drafter_contract.DTYPES)
@pytest.mark.parametrize("part", drafter_contract.PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_keeps_the_contract(name, part, dtype):
    drafter_contract.PARTS[part](world(dtype), name)


@pytest.mark.parametrize("name", RANDOM)
def test_the_fingerprint_is_of_weights_and_type(name):
    drafter, _ = make(name)
    assert drafter.fingerprint() != make(name, heads=RANDOM | {name: "random:4"})[0].fingerprint()
    assert drafter.fingerprint() != make(name, dtype="bfloat16")[0].fingerprint()


class Broken(NgramDrafter):
    """Drafts one node too many, and remembers a sequence in itself."""

    def propose(self, batch, budgets):
        self.seen = [ctx.request_id for ctx in batch]
        return [guessed_chain([1] * (budget + 1), 0.5) for budget in budgets]


@pytest.mark.parametrize(
    ("part", "promise"), [("trees, temperature 0", "no more nodes than the budget"), ("state", "not in the drafter")]
)
def test_a_broken_promise_is_found(monkeypatch, part, promise):
    monkeypatch.setattr("pdspec.spec.ngram.drafter.NgramDrafter", Broken)
    with pytest.raises(drafter_contract.ContractBroken, match=promise):
        drafter_contract.PARTS[part](world("float32"), "ngram")


def test_the_command_says_what_is_kept(monkeypatch):
    found = drafter_contract.run("ngram", worker={"model": "tiny"}, dtypes=("float32",))
    assert found["ok"] and set(found["parts"].values()) == {"kept"} and len(found["parts"]) == 5
    monkeypatch.setattr("pdspec.spec.ngram.drafter.NgramDrafter", Broken)
    found = drafter_contract.run("ngram", worker={"model": "tiny"}, dtypes=("float32",))
    assert not found["ok"] and "budget" in found["parts"]["trees, temperature 0, float32"]


def test_an_unknown_drafter_is_refused_by_name():
    with pytest.raises(UnknownName, match="hydra.*" + ", ".join(NAMES)):
        make("hydra", PagedCache((), 1, 16))
    with pytest.raises(UnknownName, match="hydra"):
        draft_groups(["none", "hydra"], setting(heads={}))


def test_a_head_from_a_folder_is_held_to_its_target(tmp_path, caplog):
    target = TargetIdentity.of(TARGET, content_hash="c0", tokenizer_hash="t0")
    save_head(tmp_path, random_head(Eagle3Config.for_target(TARGET, 40), 1, target), int8=True)
    heads = {"eagle3": str(tmp_path)}
    with caplog.at_level(logging.WARNING):
        assert make("eagle3", heads=heads, strict=True)[0].target_matches
    assert not caplog.text
    assert not make("eagle3", heads=heads, content_hash="c1")[0].target_matches
    with pytest.raises(Incompatible, match="content_hash"):
        make("eagle3", heads=heads, content_hash="c1", strict=True)
    with pytest.raises(Incompatible, match="tokenizer_hash"):
        make("eagle3", heads=heads, tokenizer_hash="t1")
    with pytest.raises(Incompatible, match=r"geometry\.rope_theta = 10000\.0.* 5000\.0"):
        make("eagle3", heads=heads, config=replace(TARGET, rope_theta=5000.0))


def test_the_shipped_head_is_found_by_geometry_and_content(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "SHIPPED_HEADS", tmp_path)
    with pytest.raises(ConfigError, match=r"heads\.eagle3.*pdspec train eagle3"):
        make("eagle3", heads={})
    config = Eagle3Config.for_target(TARGET, 40)
    for folder, seed, changes in (("a", 1, {"content_hash": "c9"}), ("b", 2, {}), ("c", 3, {"tokenizer_hash": "t9"})):
        target = replace(TargetIdentity.of(TARGET, content_hash="c0", tokenizer_hash="t0"), **changes)
        save_head(tmp_path / f"eagle3-{folder}", random_head(config, seed, target))
    found = {make("eagle3", heads={"eagle3": str(tmp_path / f"eagle3-{n}")})[0].fingerprint(): n for n in "ab"}
    assert found[make("eagle3", heads={})[0].fingerprint()] == "b"
    assert found[make("eagle3", heads={}, content_hash="c7")[0].fingerprint()] in "ab"


def test_describing_drafters_needs_no_torch():
    code = "import sys, pdspec.spec.registry as r; r.describe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
