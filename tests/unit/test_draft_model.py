"""The draft model against a dense float64 recompute: KV and logits after the prefill and after verifications, what is
kept and what is computed anew, and its trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_llama import child_scores, paths
from draft_model_world import CONFIG, DENSE, Story, assert_as_recomputed, make_world, same_drafts

from pdspec.errors import TransferDamaged
from pdspec.sampling import History
from pdspec.spec.chooser import Seeded
from pdspec.spec.draft_model.config import GROUP
from pdspec.spec.protocol import HiddenRows, Verdict
from pdspec.spec.verify import verify


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_after_the_prefill_and_each_of_20_verifications_state_equals_a_recompute(ops, temperature):
    """Rows behind the root are NaN before every proposal: none is read before it is written."""
    world = make_world(ops)
    cases = ((1, 1, ""), (2, 13, "chain(4)"), (3, 24, "static(2x2x1)"))
    stories = [Story(world, seed, n, temperature=temperature, tree=tree) for seed, n, tree in cases]
    for story in stories:
        assert_as_recomputed(story.prefill())
        world.drafter.start(story.ctx)
    accepted = set()
    for _ in range(20):
        for story in stories:
            story.poison_scratch()
        drafts = world.drafter.propose([story.ctx for story in stories], [6, 6, 6])
        news = [story.verdict(draft) for story, draft in zip(stories, drafts, strict=True)]
        accepted |= {verdict.num_accepted for _, verdict, _ in news}
        world.drafter.observe(news)
        for story in stories:
            assert_as_recomputed(story)
    assert accepted == {0, 1, 2, 3, 4}


def test_only_what_is_missing_is_computed(native):
    """The new root's row, and the deepest node's, which was never expanded."""
    world = make_world(native)
    story = Story(world, 4, 10, tree="chain(3)").prefill()
    for accepted, due in ((0, 1), (1, 1), (2, 1), (3, 2)):
        (draft,) = world.drafter.propose([story.ctx], [3])
        assert world.computed[-2:] == [1, 1]  # two levels are expanded
        news = story.verdict(draft, accepted - 1)
        del world.computed[:]
        world.drafter.observe([news])
        assert world.computed == [due]
        assert_as_recomputed(story)


def test_tokens_that_another_drafter_proposed_are_computed(native):
    world = make_world(native)
    story = Story(world, 4, 10, tree="chain(3)").prefill()
    (draft,) = world.drafter.propose([story.ctx], [3])
    story.ctx.token_ids += [5, 6, int(draft.token_ids[2]), 7]
    hidden = HiddenRows(start=10, captured=None, final=None, count=4)
    world.drafter.observe([(story.ctx, Verdict(path=(0, 1, 2), output_ids=(5, 6, 7, 7)), hidden)])
    assert_as_recomputed(story)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_chain_is_the_coupled_best_at_every_depth(ops, temperature):
    story = Story(make_world(ops), 6, 7, temperature=temperature, tree="chain(5)").prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [5])
    assert draft.parents.tolist() == [-1, 0, 1, 2, 3]
    tokens = list(story.ctx.token_ids)
    for depth, (token, log_q) in enumerate(zip(draft.token_ids.tolist(), draft.log_q.tolist(), strict=True), 1):
        logits = DENSE(tokens)[1][-1]
        assert token == int(child_scores(logits, story.ctx, depth).argmax())
        assert log_q == pytest.approx(float((logits / (temperature or 1)).log_softmax(-1)[token]), abs=1e-3)
        tokens.append(token)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(3, 3, 6), (2, 5, 12)])
def test_a_dynamic_tree_has_the_best_nodes_of_the_whole_search(ops, temperature, shape):
    depth, top_k, nodes = shape
    tree = f"dynamic({depth},{top_k},{nodes})"
    story = Story(make_world(ops), 5, 9, temperature=temperature, tree=tree).prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [64])
    scores, frontier = {}, [()]
    for level in range(depth):
        children = {}
        for path in frontier:
            best = child_scores(DENSE([*story.ctx.token_ids, *path])[1][-1], story.ctx, level + 1).topk(top_k)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                children[(*path, token)] = value + scores.get(path, 0.0)
        scores |= children
        frontier = sorted(children, key=lambda path: -children[path])[:top_k]
    assert set(paths(draft)) == set(sorted(scores, key=lambda path: -scores[path])[:nodes])


@pytest.mark.parametrize("cuts", [(1,), (8,), (3, 4, 19), tuple(range(1, 20))])
@pytest.mark.parametrize("early_last", [False, True])
def test_chunked_prefill_is_unchunked_prefill_to_the_bit(native, cuts, early_last):
    whole, cut = (Story(make_world(native), 9, 20) for _ in range(2))
    whole.prefill()
    cut.prefill(cuts, early_last=early_last)
    assert cut.ctx.token_ids == whole.ctx.token_ids
    assert torch.equal(cut.kv_rows(), whole.kv_rows())
    assert torch.equal(cut.ctx.state.logits, whole.ctx.state.logits)


def test_each_chunk_makes_the_rows_that_the_index_table_promises(native):
    """Rows [a, b) and the row of the token behind them, which is prompt, or t_n at the end: n+1 rows."""
    world = make_world(native)
    story = Story(world, 9, 20)
    for a, b in ((0, 7), (7, 16), (16, 20)):
        if b == 20:
            story.ctx.token_ids += story.tokens(1)
        world.drafter.prefill(story.ctx, HiddenRows(start=a, captured=None, final=None, count=b - a))
        assert story.ctx.state.rows == b + 1 == world.drafter.rows_at(b)[GROUP]
        assert (story.ctx.state.logits is None) == (b < 20)
    with pytest.raises(ValueError, match="draft rows are made"):
        world.drafter.prefill(story.ctx, HiddenRows(start=9, captured=None, final=None, count=2))


def test_long_prompts_take_several_forwards(native, monkeypatch):
    monkeypatch.setattr("pdspec.spec.draft_model.drafter.CHUNK", 8)
    story = Story(make_world(native), 9, 21).prefill()
    assert story.world.computed == [8, 8, 6]
    assert_as_recomputed(story)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_is_each_sequence_alone_to_the_bit(native, temperature):
    together, alone = make_world(native), make_world(native)
    cases = ((1, 1, "chain(3)"), (2, 13, "dynamic(3,3,6)"), (3, 24, "static(2x2x1)"))
    batch, singles = (
        [Story(world, seed, n, temperature=temperature, tree=tree).prefill() for seed, n, tree in cases]
        for world in (together, alone)
    )
    for _ in range(6):
        drafts = together.drafter.propose([story.ctx for story in batch], [6, 5, 4])
        single = [alone.drafter.propose([s.ctx], [budget])[0] for s, budget in zip(singles, (6, 5, 4), strict=True)]
        assert same_drafts(drafts, single)
        together.drafter.observe([story.verdict(draft) for story, draft in zip(batch, drafts, strict=True)])
        for story, draft in reversed(list(zip(singles, single, strict=True))):
            alone.drafter.observe([story.verdict(draft)])
        for a, b in zip(batch, singles, strict=True):
            assert torch.equal(a.kv_rows(), b.kv_rows()) and torch.equal(a.ctx.state.logits, b.ctx.state.logits)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_handoff_changes_no_proposal(native, temperature):
    here = Story(make_world(native, page_size=8), 10, 21, temperature=temperature).prefill((8,))
    there = Story(make_world(native, page_size=32), 10, 21, temperature=temperature)
    there.ctx.token_ids += there.tokens(1)
    candidates, rows = here.world.drafter.start(here.ctx)
    assert len(candidates.token_ids) == 16 and rows == {}
    for layer in range(4):
        data = here.world.cache.read_rows(GROUP, layer, here.ctx.pages, 0, 22)
        there.world.cache.write_rows(GROUP, layer, there.ctx.pages, 0, 22, data)
    there.world.drafter.resume(there.ctx, candidates, rows)
    assert here.world.drafter.fingerprint() == there.world.drafter.fingerprint()
    for _ in range(5):
        ours = here.world.drafter.propose([here.ctx], [6])
        assert same_drafts(ours, there.world.drafter.propose([there.ctx], [6]))
        here.world.drafter.observe([here.verdict(ours[0])])
        there.world.drafter.observe([there.verdict(ours[0])])
        assert torch.equal(here.kv_rows(), there.kv_rows())


def test_a_damaged_start_and_a_verdict_of_another_sequence_are_refused(native):
    story = Story(make_world(native), 12, 5).prefill()
    drafter = story.world.drafter
    with pytest.raises(TransferDamaged, match="draft_start"):
        drafter.resume(story.ctx, None, {})
    (draft,) = drafter.propose([story.ctx], [6])
    ctx, verdict, hidden = story.verdict(draft, 0)
    with pytest.raises(ValueError, match="draft rows"):
        drafter.observe([(ctx, Verdict(path=(0, 1), output_ids=verdict.output_ids), hidden)])
    with pytest.raises(ValueError, match="draft rows with the root"):
        drafter.propose([ctx], [6])


@pytest.mark.parametrize("tree", ["chain(4)", "static(3x2)"])
@pytest.mark.parametrize("shipped", [False, True])
def test_drawn_children_have_the_law_they_were_drawn_from(native, tree, shipped):
    """q of every inner node, dense and in float64; of the first draft after a handoff cut to the 16 shipped ids."""
    story = Story(make_world(native), 16, 8, temperature=0.9, tree=tree, verify="rejection").prefill()
    drafter = story.world.drafter
    if shipped:
        drafter.resume(story.ctx, *drafter.start(story.ctx))
    (draft,) = drafter.propose([story.ctx], [64])
    inner = {int(parent) for parent in draft.parents}
    assert inner <= draft.laws.keys() and -1 in inner
    every = paths(draft)
    for node in inner:
        path, law = () if node < 0 else every[node], draft.laws[node]
        log_q = (DENSE([*story.ctx.token_ids, *path])[1][-1] / 0.9).log_softmax(-1)[law.token_ids]
        cut = shipped and node < 0
        assert len(law.token_ids) == (16 if cut else CONFIG.vocab_size)
        np.testing.assert_allclose(law.log_q, log_q.log_softmax(-1).numpy(), atol=1e-3)
    logits = torch.randn(1 + draft.num_nodes, CONFIG.vocab_size, generator=torch.Generator().manual_seed(1))
    found = verify(draft, logits, story.ctx.sampling, History.of(story.ctx.token_ids), Seeded(1, 0),
                   root_position=story.ctx.root_position, end_ids=(), max_new=10)
    assert len(found.verdict.output_ids) == found.verdict.num_accepted + 1
