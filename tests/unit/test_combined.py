"""Suffix with a learned head: who drafts when, and that the head can take over at any step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from eagle3_reference import EMBEDDING, HEAD, PaperHead, Story, World, make_world

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError, InvalidRequest
from pdspec.model.ops import TorchOps
from pdspec.spec.combined.drafter import CombinedDrafter, CombinedState
from pdspec.spec.protocol import HiddenRows, Verdict
from pdspec.spec.suffix.drafter import SuffixDrafter
from pdspec.types import GenerateRequest, SamplingParams, Verify

PAPER = PaperHead(HEAD, EMBEDDING)
OPS = TorchOps(torch.device("cpu"))
FIELDS = ("token_ids", "parents", "log_q", "survival")


def combined_world() -> World:
    world = make_world(OPS, tree="chain(3)")
    world.drafter = CombinedDrafter(world.drafter, SuffixDrafter(), tree="dynamic(8,4,8)")
    return world


def looping(story: Story, period: int = 4) -> Story:
    """The prompt repeats, so that suffix has something to say."""
    story.ctx.token_ids[:] = [(i % period) * 7 for i in range(story.length)]
    return story


def verdict(story: Story, outputs: list[int], accepted: int):
    """``outputs`` are put out, all but the last of an accepted path."""
    hidden, start = story.hidden(len(outputs)), story.ctx.root_position
    story.captured = torch.cat((story.captured, hidden))
    story.ctx.token_ids += outputs
    page_size = story.world.cache.page_size
    story.world.cache.poison("draft/eagle3", story.ctx.pages, start, len(story.ctx.pages) * page_size)
    told = Verdict(path=tuple(range(accepted)), output_ids=tuple(outputs))
    return story.ctx, told, HiddenRows(start=start, captured=hidden, final=None)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_head_s_state_is_rebuilt_whoever_drafted(temperature):
    """Draft KV and first-draft logits equal a recompute after each verification, and the drafters alternate."""
    world = combined_world()
    story = looping(Story(world=world, seed=1, length=21, temperature=temperature))
    story.prefill((9,))
    drafter = world.drafter
    candidates, rows = drafter.start(story.ctx)
    drafter.resume(story.ctx, candidates, rows)
    drafted = []
    for step in range(20):
        kv, outputs = PAPER.committed(story.ctx.token_ids, story.captured)
        torch.testing.assert_close(story.kv_rows().double(), kv, atol=1e-4, rtol=0)
        feature = story.ctx.state.head.feature
        torch.testing.assert_close(feature.double(), outputs[-1:], atol=1e-4, rtol=0)
        expected = PAPER.log_q(story.ctx.token_ids, story.captured, ())
        torch.testing.assert_close(drafter.head.model.logits(feature)[0].double(), expected, atol=1e-4, rtol=0)
        before = dict(story.ctx.metrics)
        (draft,) = drafter.propose([story.ctx], [8])
        by_suffix = story.ctx.metrics["combined_suffix"] > before.get("combined_suffix", 0)
        assert by_suffix == bool(np.isnan(draft.log_q).all())
        drafted.append(by_suffix)
        # turns of the loop and of what was never seen before
        known = step % 6 > 1
        accepted = draft.token_ids[:1].tolist() if by_suffix and known else []
        root = [story.ctx.token_ids[-1], *accepted][-1]
        following = (root + 7) % 28 if root < 28 else 0
        drafter.observe([verdict(story, [*accepted, following if known else 100 + step], len(accepted))])
    assert {True, False} == set(drafted)
    assert story.ctx.metrics == {"combined_suffix": sum(drafted), "combined_head": len(drafted) - sum(drafted)}


@pytest.mark.parametrize("sampling", [
    SamplingParams(), SamplingParams(temperature=0.8), SamplingParams(temperature=0.8, verify=Verify.REJECTION),
], ids=["greedy", "coupled", "rejection"])
def test_where_nothing_repeats_it_is_the_head_alone(sampling):
    worlds = [combined_world(), make_world(OPS, tree="chain(3)")]
    stories = [Story(world=world, seed=5, length=17) for world in worlds]
    for story in stories:
        story.ctx.sampling = sampling
        story.ctx.token_ids[:] = range(17)
        story.prefill()
        story.ctx.token_ids[-1] = 99
        story.world.drafter.prefill(story.ctx, HiddenRows(start=0, captured=story.captured, final=None))
        story.world.drafter.resume(story.ctx, *story.world.drafter.start(story.ctx))
    for step in range(6):
        one, other = (story.world.drafter.propose([story.ctx], [8])[0] for story in stories)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.laws.keys() == other.laws.keys() and one.num_nodes == 3
        assert bool(one.laws) == (sampling.verify == Verify.REJECTION)
        for story in stories:
            story.world.drafter.observe([verdict(story, [120 + step], 0)])
    assert stories[0].ctx.metrics == {"combined_suffix": 0, "combined_head": 6}


def test_the_head_runs_for_those_alone_that_need_it(monkeypatch):
    world = combined_world()
    stories = [looping(Story(world=world, seed=1, length=20)), Story(world=world, seed=2, length=20)]
    for story in stories:
        story.prefill()
        if story.seed == 1:
            story.ctx.token_ids[-1] = 0
            world.drafter.prefill(story.ctx, HiddenRows(start=0, captured=story.captured, final=None))
    asked = []
    propose = world.drafter.head.propose
    monkeypatch.setattr(world.drafter.head, "propose",
                        lambda batch, budgets: asked.append([c.request_id for c in batch]) or propose(batch, budgets))
    drafts = world.drafter.propose([story.ctx for story in stories], [8, 8])
    assert asked == [["story-2"]]
    assert drafts[0].token_ids.tolist() == [7, 14, 21, 0, 7, 14, 21, 0] and drafts[1].num_nodes == 3


def test_credible_is_what_earlier_verifications_bear_out():
    state = CombinedState()
    assert not state.credible(0.0) and not state.credible(1.9) and state.credible(2.0)
    state.suffix_accepted += 20
    state.suffix_promised += 20
    assert state.credible(0.6)
    state.head_drafts += 100
    state.head_accepted += 300
    assert not state.credible(2.0) and state.credible(4.0)
    state.suffix_promised += 400
    assert not state.credible(8.0)


def test_both_learn_from_the_draft_that_was_theirs():
    world = combined_world()
    story = looping(Story(world=world, seed=1, length=20)).prefill()
    story.ctx.token_ids[-1] = 0
    world.drafter.prefill(story.ctx, HiddenRows(start=0, captured=story.captured, final=None))
    (draft,) = world.drafter.propose([story.ctx], [8])
    promised = float(draft.survival.sum())
    world.drafter.observe([verdict(story, [*draft.token_ids[:3].tolist(), 190], 3)])
    state = story.ctx.state
    assert (state.suffix_promised, state.suffix_accepted) == (4.0 + promised, 1.0 + 3)
    assert (state.head_drafts, state.head_accepted) == (4.0, 2.0)
    world.drafter.propose([story.ctx], [8])
    world.drafter.observe([verdict(story, [191], 0)])
    assert (state.head_drafts, state.head_accepted) == (5.0, 2.0)
    world.drafter.propose([story.ctx], [0])
    world.drafter.observe([verdict(story, [192], 0)])
    assert (state.head_drafts, state.suffix_promised) == (5.0, 4.0 + promised)


def test_a_named_tree_holds_for_both_and_is_the_head_s_to_refuse():
    drafter = combined_world().drafter
    assert drafter.depth("") == drafter.depth("dynamic(8,4,8)") == 8
    assert drafter.depth("chain(40)") == 40 and drafter.depth("static(2x2)") == 2
    assert drafter._suffix_tree("chain(40)") == "chain(32)"
    assert drafter._suffix_tree("static(3x2)") == "dynamic(2,3,9)"
    assert drafter._suffix_tree("dynamic(4,10,60)") == "dynamic(4,10,32)"
    assert drafter._head_tree("dynamic(8,4,8)") == "chain(3)" and drafter._head_tree("chain(2)") == "chain(2)"
    with pytest.raises(InvalidRequest, match="eagle3 cannot draft chain"):
        drafter.depth("chain(66)")


BASE = {"model": "tiny", "dtype": "float32", "threads": 1, "cache_tokens": 4096, "poison": True,
        "drafter": "combined", "drafters": ("none", "combined")}


@pytest.mark.parametrize("head", ["eagle3", "medusa", "lookahead"])
def test_any_family_may_be_the_head_and_no_token_changes(head):
    heads = {} if head == "lookahead" else {"combined": "random:0"}
    local = LocalGenerator(WorkerConfig(**BASE, heads=heads, options={"combined:head": head}))
    ctxs = {}
    drafter = local.resources.drafters["combined"]
    propose = drafter.propose
    drafter.propose = lambda batch, budgets: ctxs.update((c.request_id, c) for c in batch) or propose(batch, budgets)
    words = [11, 12, 13, 14, 15, 16, 17, 18]
    requests = [
        GenerateRequest(
            request_id=f"r{i}", prompt_ids=tuple(words * 5 + words[:i]), sampling=SamplingParams(
                temperature=0.8 * (i % 2), seed=i, max_tokens=40, ignore_eos=True, verify=Verify.COUPLED,
                logit_bias=tuple((token, 4.0) for token in words),
            ),
        )
        for i in (1, 2, 3)
    ]
    together: dict[int, list[int]] = {i: [] for i in range(3)}
    for index, chunk in local.generate_batch(requests):
        together[index] += chunk.token_ids
    for index, request in enumerate(requests):
        plain = local.generate(replace(request, drafter="none"))
        assert together[index] == [token for chunk in plain for token in chunk.token_ids]
    total = {name: sum(ctx.metrics[f"combined_{name}"] for ctx in ctxs.values()) for name in ("suffix", "head")}
    assert total["suffix"] > 0 and total["head"] > 0
    local.resources.close()


def test_what_is_no_head_is_refused():
    for name in ("suffix", "none", "combined", "hydra"):
        with pytest.raises(ConfigError, match=r"combined:head.*eagle3"):
            LocalGenerator(WorkerConfig(**BASE, options={"combined:head": name}))


@pytest.mark.parametrize("head", ["eagle1", "eagle2", "eagle3"])
def test_a_head_that_keeps_its_drafts_rows_is_refused(head):
    options = {"combined:head": head, f"{head}:stable_kv": "false"}
    with pytest.raises(ConfigError, match=f"combined cannot use {head} with {head}:stable_kv=false") as raised:
        LocalGenerator(WorkerConfig(**BASE, heads={"combined": "random:0"}, options=options))
    assert raised.value.field == f"options.{head}:stable_kv"


def loaded(heads: dict[str, str], **options: str):
    names = ("none", "eagle1", "eagle2", "eagle3", "mtp", "medusa", "draft_model", "combined")
    config = WorkerConfig(**{**BASE, "drafters": names}, heads=heads, options=options)
    local = LocalGenerator(config)
    local.resources.close()
    return local.resources.drafters


HEADS = {"eagle1": "random:1", "eagle3": "random:0", "mtp": "random:0", "medusa": "random:0", "draft_model": "random:0"}


@pytest.mark.parametrize("head", ["eagle3", "eagle1", "mtp", "medusa", "draft_model"])
def test_the_head_and_its_own_family_hold_the_weights_once(head):
    drafters = loaded(HEADS, **{"combined:head": head})
    ours, theirs = drafters["combined"].head, drafters[head]
    assert ours is not theirs and ours.fingerprint() == theirs.fingerprint()
    if head == "draft_model":
        assert ours.runner is theirs.runner
    elif head == "mtp":
        assert ours.model.modules is theirs.model.modules
    elif head == "eagle1":
        ours, theirs = ours.model._attention, theirs.model._attention
        assert ours._qkv is theirs._qkv and ours._pages.data_ptr() == theirs._pages.data_ptr()
    else:
        assert ours.model is theirs.model


def test_eagle_2_shares_eagle_1_s_weights_over_pages_of_its_own():
    drafters = loaded(HEADS)
    one, two = drafters["eagle1"].model, drafters["eagle2"].model
    assert one._attention._qkv is two._attention._qkv and one._lm_head is two._lm_head
    assert one._attention._pages.data_ptr() != two._attention._pages.data_ptr()


def test_other_heads_are_not_shared():
    drafters = loaded({**HEADS, "eagle2": "random:5", "combined": "random:6"})
    assert drafters["eagle2"].model._attention._qkv is not drafters["eagle1"].model._attention._qkv
    assert drafters["combined"].head.model is not drafters["eagle3"].model
    assert drafters["combined"].head.fingerprint() != drafters["eagle3"].fingerprint()
