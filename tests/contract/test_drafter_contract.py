"""What every drafter of the registry promises to the engines, whatever its family."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
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
from pdspec.spec.protocol import DraftContext, HiddenRows, Verdict
from pdspec.spec.registry import NAMES, describe, draft_groups, make_drafter
from pdspec.types import SamplingParams

TARGET = tiny_config("tiny")
FILES = ModelFiles(name="tiny-0", path=None, config=TARGET, content_hash="c0", tokenizer_hash="t0")
OPS = TorchOps(torch.device("cpu"))
HEADS = ("medusa", "eagle1", "eagle2", "eagle3", "mtp", "draft_model", "combined")
RANDOM = dict.fromkeys(HEADS, "random:3")
ALPHABET = 6  # so that n-grams repeat


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@cache
def target(dtype):
    return Runner(TARGET, load_weights(FILES, dtype), ops=OPS, dtype=dtype)


def setting(*, dtype="float32", heads=RANDOM, strict=False, **changes):
    return Setting(target=replace(FILES, **changes), dtype=dtype, heads=heads, strict=strict)


def make(name, pages=None, **changes):
    asked = setting(**changes)
    if pages is None:
        pages = PagedCache((TARGET.target_group(asked.dtype), *draft_groups([name], asked)), 200, 16)
    return make_drafter(name, asked, Parts(ops=OPS, cache=pages, runner=target(asked.dtype))), pages


@dataclass(kw_only=True)
class Sequence:
    """A random answer over a small alphabet; the target's hidden states are random too."""

    ctx: DraftContext
    random: np.random.Generator

    def tokens(self, count):
        return self.random.integers(0, ALPHABET, count).tolist()

    def hidden(self, drafter, start, count):
        def values(*shape):
            return torch.from_numpy(self.random.standard_normal((count, *shape)).astype(np.float32))

        return HiddenRows(
            start=start, captured=values(len(drafter.capture), TARGET.hidden_size) if drafter.capture else None,
            final=values(TARGET.hidden_size) if drafter.want_final else None, count=count,
        )

    def accept(self, drafter, draft, node):
        """A verification that takes the path down to ``node``."""
        path = []
        while node >= 0:
            path.insert(0, node)
            node = int(draft.parents[node])
        outputs = [int(draft.token_ids[node]) for node in path] + self.tokens(1)
        hidden = self.hidden(drafter, self.ctx.root_position, len(outputs))
        if draft.branch is not None:
            hidden = replace(hidden, branch_ids=np.array(self.tokens(len(draft.branch.asked))))
        self.ctx.token_ids += outputs
        return self.ctx, Verdict(path=tuple(path), output_ids=tuple(outputs)), hidden


def begin(drafter, seed, length, temperature=0.0, tree="", cuts=()):
    """A sequence after prefill, start and resume, as an engine runs them."""
    random = np.random.default_rng(seed)
    ctx = DraftContext(
        request_id=f"s{seed}", sampling=SamplingParams(temperature=temperature), noise_key=(seed, 0), tree=tree,
        token_ids=random.integers(0, ALPHABET, length).tolist(), pages=list(range(20 * seed, 20 * seed + 20)),
        prompt_len=length,
    )
    sequence = Sequence(ctx=ctx, random=random)
    for start, stop in pairwise([0, *cuts, length]):
        if stop == length:
            ctx.token_ids += sequence.tokens(1)
        drafter.prefill(ctx, sequence.hidden(drafter, start, stop - start))
    candidates, rows = drafter.start(ctx)
    assert all(row.dtype == torch.float32 for row in rows.values())
    drafter.resume(ctx, candidates, rows)
    return sequence


def check_draft(draft, budget, drafter):
    nodes = draft.num_nodes
    assert nodes <= budget and len(draft.rows[0]) <= drafter.max_nodes
    assert [a.shape for a in (draft.parents, draft.log_q, draft.survival)] == [(nodes,)] * 3
    assert (draft.token_ids.dtype, draft.parents.dtype) == (np.int32, np.int32)
    assert (draft.log_q.dtype, draft.survival.dtype) == (np.float32, np.float32)
    assert ((draft.parents >= -1) & (draft.parents < np.arange(nodes))).all()
    edges = list(zip(draft.parents.tolist(), draft.token_ids.tolist(), strict=True))
    assert len(edges) == len(set(edges))
    assert ((draft.token_ids >= 0) & (draft.token_ids < TARGET.vocab_size)).all()
    assert ((draft.survival >= 0) & (draft.survival <= 1)).all()
    assert (draft.survival <= np.where(draft.parents < 0, 1, draft.survival[draft.parents])).all()
    assert (np.isnan(draft.log_q) | (draft.log_q <= 0)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_trees_within_budget_through_a_whole_answer(name, temperature, dtype):
    drafter, _ = make(name, dtype=dtype)
    random = np.random.default_rng(7)
    cases = [(1, 1, ()), (2, 9, (4,)), (3, 40, ())]
    sequences = [begin(drafter, seed, n, temperature, cuts=cuts) for seed, n, cuts in cases]
    drafted = 0
    for _ in range(15):
        budgets = [int(budget) for budget in random.integers(0, 10, len(sequences))]
        drafts = drafter.propose([sequence.ctx for sequence in sequences], budgets)
        assert len(drafts) == len(sequences)
        news = []
        for sequence, draft, budget in zip(sequences, drafts, budgets, strict=True):
            check_draft(draft, budget, drafter)
            drafted += draft.num_nodes
            news.append(sequence.accept(drafter, draft, int(random.integers(-1, draft.num_nodes))))
        drafter.observe(news)
    assert (drafted > 0) == (name != "none")


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_s_state_is_in_its_context_and_pages_alone(name):
    """Two drafters that take turns over the same pages draft what one would: no request is its own earlier answer."""
    one, cache = make(name)
    other, _ = make(name, cache)
    single, _ = make(name)
    before = dict(vars(one))
    turns, plain = begin(one, 1, 30), begin(single, 1, 30)
    for turn in range(8):
        drafter = (one, other)[turn % 2]
        (draft,), (expected,) = drafter.propose([turns.ctx], [8]), single.propose([plain.ctx], [8])
        for field in ("token_ids", "parents", "log_q", "survival"):
            np.testing.assert_array_equal(getattr(draft, field), getattr(expected, field))
        (other, one)[turn % 2].observe([turns.accept(drafter, draft, draft.num_nodes - 1)])
        single.observe([plain.accept(single, expected, expected.num_nodes - 1)])
    assert vars(one).keys() == before.keys() and all(vars(one)[key] is value for key, value in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_are_fine(name):
    drafter, _ = make(name)
    assert drafter.propose([], []) == []
    drafter.observe([])


@pytest.mark.parametrize("name", NAMES)
def test_groups_rows_and_fingerprint(name):
    drafter, cache = make(name)
    assert drafter.name == name
    assert drafter.groups == draft_groups([name], setting())
    assert all(cache.layout(group.name) == group for group in drafter.groups)
    for count in (1, 17):
        assert drafter.rows_at(count).keys() == {group.name for group in drafter.groups}
    assert all(0 <= layer < TARGET.num_layers for layer in drafter.capture)
    assert drafter.fingerprint() == make(name)[0].fingerprint()
    if name in RANDOM:
        assert drafter.fingerprint() != make(name, heads=RANDOM | {name: "random:4"})[0].fingerprint()
        assert drafter.fingerprint() != make(name, dtype="bfloat16")[0].fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_the_described_default_tree_is_the_one_that_is_drafted(name):
    described = {one["name"]: one for one in describe()}
    drafter, _ = make(name)
    assert described.keys() == set(NAMES)
    assert described[name]["default_tree"] == drafter.default_tree


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
