"""The EAGLE-3 drafter against the papers: its KV, scores and trees, after the prefill and after verifications."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from eagle3_reference import (
    EMBEDDING,
    HEAD,
    TARGET,
    PaperHead,
    Story,
    child_scores,
    eagle2_tree,
    make_world,
    paths,
)

from pdspec.errors import InvalidRequest, TransferDamaged
from pdspec.spec.protocol import HiddenRows, Verdict

PAPER = PaperHead(HEAD, EMBEDDING)


def same_drafts(a, b) -> bool:
    names = ("token_ids", "parents", "log_q", "survival")
    return all(np.array_equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names)


def assert_as_recomputed(story: Story) -> None:
    """Draft KV and the logits of the first draft token equal a recompute from the committed tokens alone."""
    kv, outputs = PAPER.committed(story.ctx.token_ids, story.captured)
    assert len(kv) == story.ctx.root_position == story.ctx.state.rows
    torch.testing.assert_close(story.kv_rows().double(), kv, atol=1e-4, rtol=0)
    feature = story.ctx.state.feature
    torch.testing.assert_close(feature.double(), outputs[-1:], atol=1e-4, rtol=0)
    expected = PAPER.log_q(story.ctx.token_ids, story.captured, ())
    torch.testing.assert_close(story.world.drafter.model.logits(feature)[0].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_after_the_prefill_and_each_of_20_verifications_state_equals_a_recompute(ops, temperature):
    world = make_world(ops)
    cases = ((1, 1, ""), (2, 13, "chain(4)"), (3, 24, "static(2x2x1)"))
    stories = [Story(world=world, seed=s, length=n, temperature=temperature, tree=tree) for s, n, tree in cases]
    for story in stories:
        assert_as_recomputed(story.prefill())
        story.world.drafter.start(story.ctx)
    accepted = set()
    for _ in range(20):
        drafts = world.drafter.propose([story.ctx for story in stories], [6, 6, 6])
        news = [story.verdict(draft) for story, draft in zip(stories, drafts, strict=True)]
        accepted |= {verdict.num_accepted for _, verdict, _ in news}
        world.drafter.observe(news)
        for story in stories:
            assert_as_recomputed(story)
    assert accepted == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(3, 3, 6), (4, 4, 8), (1, 5, 5), (5, 2, 20)])
def test_a_dynamic_tree_is_eagle_2_in_full(ops, temperature, shape):
    world = make_world(ops, tree="dynamic({},{},{})".format(*shape))
    story = Story(world=world, seed=4, length=11, temperature=temperature).prefill()
    for _ in range(4):
        (draft,) = world.drafter.propose([story.ctx], [64])
        expected = eagle2_tree(PAPER, story.ctx, story.captured, *shape)
        assert set(paths(draft)) == set(expected)
        survival = dict(zip(paths(draft), draft.survival.tolist(), strict=True))
        assert survival == pytest.approx({path: np.exp(score) for path, score in expected.items()}, abs=1e-4)
        world.drafter.observe([story.verdict(draft)])


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7])
def test_a_smaller_budget_gives_the_best_nodes_of_the_same_search(ops, budget):
    story = Story(world=make_world(ops), seed=5, length=9, temperature=0.8, tree="dynamic(4,3,8)").prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [budget])
    assert set(paths(draft)) == set(eagle2_tree(PAPER, story.ctx, story.captured, 4, 3, budget))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_chain_is_the_coupled_best_at_every_depth(ops, temperature):
    story = Story(world=make_world(ops), seed=6, length=7, temperature=temperature, tree="chain(5)").prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [5])
    assert draft.parents.tolist() == [-1, 0, 1, 2, 3]
    path: tuple[int, ...] = ()
    for token, log_q in zip(draft.token_ids.tolist(), draft.log_q.tolist(), strict=True):
        best = int(child_scores(PAPER, story.ctx, story.captured, path).argmax())
        assert token == int(HEAD.target_ids[best])
        logits = PAPER.log_q(story.ctx.token_ids, story.captured, path) / (temperature or 1.0)
        assert log_q == pytest.approx(float(logits.log_softmax(-1)[best]), abs=1e-4)
        path = (*path, token)


def test_a_static_tree_has_its_shape_and_ranks(ops):
    story = Story(world=make_world(ops), seed=7, length=7, temperature=0.8, tree="static(3x2x1)").prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [64])
    assert draft.parents.tolist() == [-1, -1, -1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    for node, path in enumerate(paths(draft)):
        siblings = [i for i in range(draft.num_nodes) if draft.parents[i] == draft.parents[node]]
        order = child_scores(PAPER, story.ctx, story.captured, path[:-1]).argsort(descending=True)
        assert path[-1] == int(HEAD.target_ids[order[siblings.index(node)]])


def test_proposals_are_target_ids_of_the_draft_vocabulary(ops):
    story = Story(world=make_world(ops), seed=8, length=7).prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [6])
    allowed = set(HEAD.target_ids.tolist())
    assert set(draft.token_ids.tolist()) <= allowed and len(allowed) < TARGET.vocab_size
    assert HEAD.target_ids.tolist() != list(range(len(allowed)))


@pytest.mark.parametrize("cuts", [(1,), (8,), (3, 4, 19), tuple(range(1, 20))])
@pytest.mark.parametrize("early_last", [False, True])
def test_chunked_prefill_is_unchunked_prefill_to_the_bit(native, cuts, early_last):
    whole, cut = Story(world=make_world(native), seed=9, length=20), Story(world=make_world(native), seed=9, length=20)
    whole.prefill()
    cut.prefill(cuts, early_last=early_last)
    assert cut.ctx.token_ids == whole.ctx.token_ids
    assert torch.equal(cut.kv_rows(), whole.kv_rows())
    assert torch.equal(cut.ctx.state.feature, whole.ctx.state.feature)


def test_a_prefill_can_begin_anew(native):
    whole, again = (Story(world=make_world(native), seed=9, length=20) for _ in range(2))
    again.world.drafter.prefill(again.ctx, HiddenRows(start=0, captured=again.captured[:7] + 1, final=None))
    again.prefill((4,))
    assert torch.equal(again.kv_rows(), whole.prefill().kv_rows())


def test_a_prefill_can_stand_behind_rows_that_are_there(native):
    whole, rest = (Story(world=make_world(native), seed=9, length=20) for _ in range(2))
    rest.ctx.token_ids += rest.tokens(1)
    rest.world.cache.write_rows("draft/eagle3", 0, rest.ctx.pages, 0, 8,
                                whole.prefill().world.cache.read_rows("draft/eagle3", 0, whole.ctx.pages, 0, 8))
    rest.world.drafter.prefill(rest.ctx, HiddenRows(start=8, captured=rest.captured[8:], final=None))
    assert torch.equal(rest.kv_rows(), whole.kv_rows())
    assert torch.equal(rest.ctx.state.feature, whole.ctx.state.feature)


def test_a_row_waits_for_its_token(ops):
    story = Story(world=make_world(ops), seed=9, length=6)
    story.world.drafter.prefill(story.ctx, HiddenRows(start=0, captured=story.captured, final=None))
    assert story.ctx.state.rows == 5 and story.ctx.state.waiting.shape == (1, TARGET.hidden_size)
    with pytest.raises(ValueError, match="hidden rows"):
        story.world.drafter.prefill(story.ctx, HiddenRows(start=5, captured=story.captured[5:], final=None))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bits_do_not_depend_on_the_batch(native, temperature):
    lengths = [3, 17, 8, 40, 9]
    trees = ["", "chain(4)", "static(2x2)", "dynamic(4,4,8)", ""]
    budgets = [6, 4, 6, 8, 0]

    def stories():
        world = make_world(native)
        return world, [
            Story(world=world, seed=20 + i, length=n, temperature=temperature, tree=trees[i]).prefill()
            for i, n in enumerate(lengths)
        ]

    (together, batch), (alone, singles) = stories(), stories()
    for _ in range(6):
        drafts = together.drafter.propose([story.ctx for story in batch], budgets)
        single = [alone.drafter.propose([story.ctx], [n])[0] for story, n in zip(singles, budgets, strict=True)]
        assert same_drafts(drafts, single)
        together.drafter.observe([story.verdict(draft) for story, draft in zip(batch, drafts, strict=True)])
        for story, draft in reversed(list(zip(singles, single, strict=True))):
            alone.drafter.observe([story.verdict(draft)])
        for a, b in zip(batch, singles, strict=True):
            assert torch.equal(a.kv_rows(), b.kv_rows()) and torch.equal(a.ctx.state.feature, b.ctx.state.feature)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_handoff_changes_no_proposal(native, temperature):
    here = Story(world=make_world(native, page_size=8), seed=10, length=21, temperature=temperature).prefill((8,))
    there = Story(world=make_world(native, page_size=32), seed=10, length=21, temperature=temperature)
    there.ctx.token_ids += there.tokens(1)
    candidates, rows = here.world.drafter.start(here.ctx)
    data = here.world.cache.read_rows("draft/eagle3", 0, here.ctx.pages, 0, 21)
    there.world.cache.write_rows("draft/eagle3", 0, there.ctx.pages, 0, 21, data)
    there.world.drafter.resume(there.ctx, candidates, {name: row.clone() for name, row in rows.items()})
    assert here.world.drafter.fingerprint() == there.world.drafter.fingerprint()
    for _ in range(5):
        ours = here.world.drafter.propose([here.ctx], [6])
        assert same_drafts(ours, there.world.drafter.propose([there.ctx], [6]))
        here.world.drafter.observe([here.verdict(ours[0])])
        there.world.drafter.observe([there.verdict(ours[0])])
        assert torch.equal(here.kv_rows(), there.kv_rows())


def test_first_tokens_are_the_best_by_log_q_plus_noise_with_room_for_the_tree(ops):
    for tree, count in (("chain(2)", 16), ("dynamic(2,20,30)", 20), ("static(18x1)", 18)):
        story = Story(world=make_world(ops), seed=11, length=5, temperature=0.8, tree=tree).prefill()
        candidates, rows = story.world.drafter.start(story.ctx)
        score = child_scores(PAPER, story.ctx, story.captured, ())
        best = score.topk(count)
        assert candidates.token_ids.tolist() == HEAD.target_ids[best.indices].tolist()
        np.testing.assert_allclose(candidates.score, best.values.numpy(), atol=1e-4)
        log_q = (PAPER.log_q(story.ctx.token_ids, story.captured, ()) / 0.8).log_softmax(-1)
        np.testing.assert_allclose(candidates.log_q, log_q[best.indices].numpy(), atol=1e-4)
        assert rows["feature"].shape == (1, TARGET.hidden_size)


def test_a_damaged_start_is_refused(ops):
    story = Story(world=make_world(ops), seed=12, length=5).prefill()
    drafter, (candidates, rows) = story.world.drafter, story.world.drafter.start(story.ctx)
    short = replace(candidates, token_ids=candidates.token_ids[:3])
    for what in ((None, rows), (short, rows), (candidates, {}), (candidates, {"feature": rows["feature"][:, :7]})):
        with pytest.raises(TransferDamaged, match="draft_start"):
            drafter.resume(story.ctx, *what)


def test_other_peoples_rows_are_refused(ops):
    story = Story(world=make_world(ops), seed=13, length=5).prefill()
    drafter = story.world.drafter
    (draft,) = drafter.propose([story.ctx], [6])
    ctx, verdict, hidden = story.verdict(draft)
    wrong = [
        (verdict, replace(hidden, start=hidden.start + 1)),
        (verdict, replace(hidden, captured=torch.cat((hidden.captured, hidden.captured)))),
        (Verdict(path=(*verdict.path, 1), output_ids=verdict.output_ids), hidden),
    ]
    for bad_verdict, bad_hidden in wrong:
        with pytest.raises(ValueError, match="hidden rows"):
            drafter.observe([(ctx, bad_verdict, bad_hidden)])
    with pytest.raises(ValueError, match="draft rows with the root"):
        drafter.propose([ctx], [6])


def test_trees_that_are_too_large_are_refused(ops):
    drafter = make_world(ops).drafter
    assert drafter.depth("chain(9)") == 9 and drafter.depth("") == 3
    for tree in ("chain(66)", "dynamic(4,4,65)", "dynamic(20,10,60)"):
        with pytest.raises(InvalidRequest, match="tree"):
            drafter.depth(tree)


def test_the_last_positions_of_the_context_are_drafted_without_leaving_it(ops):
    length = TARGET.max_context - 3  # the root stands at 253; rows go up to position 255
    world = make_world(ops, page_size=32)
    story = Story(world=world, seed=14, length=length, tree="chain(8)")
    story.ctx.pages = story.ctx.pages + world.pool.allocate(5)
    (draft,) = world.drafter.propose([story.prefill().ctx], [8])
    assert draft.num_nodes == 4


def test_pages_that_are_too_few_are_an_error_and_not_an_overwrite(ops):
    story = Story(world=make_world(ops), seed=15, length=8, tree="chain(4)").prefill()
    story.ctx.pages = story.ctx.pages[:1]
    with pytest.raises(ValueError, match="pages"):
        story.world.drafter.propose([story.ctx], [4])
