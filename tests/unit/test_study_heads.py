"""Which families have a head, and what the others draft with."""

from __future__ import annotations

import json
import sys

import pytest

from pdspec.cli import app
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError, UnknownName
from pdspec.spec.registry import NAMES
from pdspec.study.heads import RANDOM, at_hand, families, with_random_heads, worker_config
from pdspec.study.parity import trees_of

TINY = {"model": "tiny", "threads": 1, "cache_tokens": 2048}
FREE = ("none", "ngram", "suffix", "lookahead", "sparse")  # need no head


def test_a_list_names_families_and_all_means_the_registry():
    assert families("mtp, none,mtp") == ("mtp", "none")
    assert families("all") == NAMES and families("sparse,all")[0] == "sparse"
    with pytest.raises(UnknownName, match="no drafter 'hydra'"):
        families("none,hydra")
    with pytest.raises(ConfigError, match="no drafter is named"):
        families(" ,")


def test_families_without_a_head_get_a_random_one_and_those_that_may_use_another_s_use_it():
    config, missing = with_random_heads(worker_config(TINY, NAMES))
    assert missing == ("medusa", "eagle1", "eagle3", "mtp", "draft_model")  # eagle2 and combined use theirs
    assert config.heads == dict.fromkeys(missing, RANDOM)
    given = {**TINY, "heads": {"eagle3": "random:1"}}
    config, missing = with_random_heads(worker_config(given, ("eagle3", "combined")))
    assert missing == () and config.heads == {"eagle3": "random:1"}
    assert with_random_heads(worker_config(TINY, ("combined",)))[1] == ("combined",)


def test_at_hand_is_what_needs_no_head_or_has_one():
    assert at_hand(TINY) == FREE
    assert at_hand({**TINY, "heads": {"eagle1": "random:1"}}) == (*FREE[:4], "eagle1", "eagle2", "sparse")
    every = {name: "random:1" for name in NAMES if name not in FREE}
    assert at_hand({**TINY, "heads": every}) == NAMES
    with pytest.raises(ConfigError, match="guess"):  # not a head that is missing
        at_hand({**TINY, "options": {"lookahead:guesses": "guess"}})


def test_every_family_is_asked_for_one_tree_of_each_kind_that_it_can_draft():
    config, _ = with_random_heads(worker_config({**TINY, "options": {"mtp:modules": "1"}}, NAMES))
    local = LocalGenerator(config)
    trees = {name: trees_of(drafter) for name, drafter in local.resources.drafters.items()}
    local.resources.close()
    assert trees["none"] == [""] and trees["ngram"] == ["chain(7)"]
    assert trees["suffix"] == ["dynamic(8,4,8)", "chain(3)"]
    assert trees["mtp"] == ["chain(1)", "static(4)", "dynamic(1,4,4)"]
    assert trees["eagle3"] == ["chain(2)", "static(2x2)", "dynamic(4,4,8)"]


def test_check_parity_of_a_family_without_a_head(monkeypatch, capsys):
    asked = ("--drafters", "medusa", "--dtype", "float32", "--num-prompts", "1", "--max-tokens", "6",
             "--no-transformers")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["pdspec", "check", "parity", *asked, "--model", "tiny", "--json"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    found = json.loads(capsys.readouterr().out)
    assert not ended.value.code and found["ok"] and found["mismatched"] == 0
    assert found["cases"] == 2 * 2 * 3  # greedy and sampled, direct and relayed, a tree of each kind
    assert found["drafters"] == found["random_heads"] == ["medusa"]
