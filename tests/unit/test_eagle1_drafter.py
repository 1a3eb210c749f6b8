"""The EAGLE-1 drafter against the paper, and what EAGLE-1, EAGLE-3 and EAGLE-3.1 share: unstable KV and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eagle1_reference import HEAD, HEADS, LM_HEAD, TARGET, PaperEagle1, Story, make_world
from eagle3_reference import EMBEDDING, eagle2_tree, paths

from pdspec.errors import TransferDamaged
from pdspec.sampling import History
from pdspec.spec.protocol import HiddenRows
from pdspec.spec.verify import verify
from pdspec.study.outcomes import outcomes_of
from pdspec.types import SamplingParams, Verify

PAPER = PaperEagle1(HEAD, EMBEDDING, LM_HEAD)
TREES = (("chain(4)", 13), ("static(2x2x1)", 24), ("dynamic(3,3,6)", 1))
UNSTABLE, PADDED = {"stable_kv": False}, {"padding": True}
VARIANTS = [
    ("eagle1", {}), ("eagle1", PADDED), ("eagle1", UNSTABLE), ("eagle1", {**UNSTABLE, **PADDED}), ("whole", {}),
    ("eagle3", PADDED), ("eagle3", UNSTABLE), ("fc_norm", {}), ("norm_output", {}), ("eagle3.1", {}), ("tied", {}),
    ("eagle3.1", {**UNSTABLE, **PADDED}),
]


def same_drafts(a, b) -> bool:
    names = ("token_ids", "parents", "log_q", "survival")
    return all(np.array_equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=[f"{k}-{'-'.join(o) or 'default'}" for k, o in VARIANTS])
def test_after_the_prefill_and_each_verification_state_equals_the_paper_s(ops, kind, options):
    world = make_world(ops, kind, **options)
    stories = [
        Story(world=world, seed=s, length=n, temperature=0.8 * (s % 2), tree=tree).prefill((n // 2,) if n > 1 else ())
        for s, (tree, n) in enumerate(TREES)
    ]
    for story in stories:
        story.assert_as_recomputed()
        world.drafter.start(story.ctx)
    accepted, kept = set(), set()
    for _ in range(16):
        drafts = world.drafter.propose([story.ctx for story in stories], [6, 10, 6])
        news = [story.verdict(draft) for story, draft in zip(stories, drafts, strict=True)]
        world.drafter.observe(news)
        for story, (_, verdict, _) in zip(stories, news, strict=True):
            story.poison(story.ctx.root_position)
            story.assert_as_recomputed()
            accepted.add(verdict.num_accepted)
            kept.add(story.kept)
        chain = news[0][1].num_accepted  # of a chain of four nodes the first three are expanded
        assert stories[0].kept == (min(chain, 3) if options.get("stable_kv") is False else 0)
    assert accepted == {0, 1, 2, 3, 4}
    assert kept == ({0, 1, 2, 3} if options.get("stable_kv") is False else {0})


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", [(3, 3, 6), (4, 4, 8)])
def test_a_dynamic_tree_is_eagle_2_in_full(ops, temperature, shape):
    world = make_world(ops, tree="dynamic({},{},{})".format(*shape))
    story = Story(world=world, seed=4, length=11, temperature=temperature).prefill()
    for _ in range(3):
        (draft,) = world.drafter.propose([story.ctx], [64])
        expected = eagle2_tree(PAPER, story.ctx, story.target, *shape)
        assert set(paths(draft)) == set(expected)
        survival = dict(zip(paths(draft), draft.survival.tolist(), strict=True))
        assert survival == pytest.approx({path: np.exp(score) for path, score in expected.items()}, abs=1e-4)
        world.drafter.observe([story.verdict(draft)])


@pytest.mark.parametrize("kept", [9, 5, 1, 0])
def test_below_the_threshold_nothing_is_expanded_or_kept(ops, kept):
    """A threshold between the tree's ``kept`` best nodes and the others leaves exactly those."""

    def grown(threshold):
        world = make_world(ops, tree="dynamic(4,4,12)", threshold=threshold)
        story, rows, forward = Story(world=world, seed=5, length=9).prefill(), [], world.drafter.model.forward
        world.drafter.model.forward = lambda batch, *rest: rows.append(batch.num_rows) or forward(batch, *rest)
        return world.drafter.propose([story.ctx], [64])[0], sum(rows), story

    whole, expanded, story = grown(0.0)
    tree = eagle2_tree(PAPER, story.ctx, story.target, 4, 4, 12)
    chances = [1.0, *(float(np.exp(score)) for score in tree.values())]
    part, fewer, _ = grown((chances[kept] + chances[kept + 1]) / 2)
    assert set(paths(whole)) == set(tree) and set(paths(part)) == set(list(tree)[:kept])
    assert fewer < expanded


def test_public_heads_draft_the_whole_vocabulary_with_the_target_s_own_lm_head(native):
    world = make_world(native, "whole", tree="chain(3)")
    story = Story(world=world, seed=6, length=7).prefill()
    assert world.drafter.model._lm_head.rows == TARGET.vocab_size
    (draft,) = world.drafter.propose([story.ctx], [3])
    path: tuple[int, ...] = ()
    for token in draft.token_ids.tolist():
        assert token == int(world.paper.log_q(story.ctx.token_ids, story.target, path).argmax())
        path = (*path, token)
    assert HEADS["whole"].target_ids.tolist() == sorted(HEADS["whole"].target_ids.tolist())


def test_a_draft_vocabulary_takes_the_target_s_rows(ops):
    story = Story(world=make_world(ops), seed=8, length=7).prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [6])
    assert set(draft.token_ids.tolist()) <= set(HEAD.target_ids.tolist()) and len(HEAD.target_ids) < TARGET.vocab_size


@pytest.mark.parametrize("options", [{}, PADDED])
@pytest.mark.parametrize("cuts", [(1,), (3, 4, 19), tuple(range(1, 20))])
def test_chunked_prefill_is_unchunked_prefill_to_the_bit(native, cuts, options):
    whole, cut = (Story(world=make_world(native, **options), seed=9, length=20) for _ in range(2))
    whole.prefill()
    cut.prefill(cuts)
    assert torch.equal(cut.kv_rows(), whole.kv_rows()) and len(cut.kv_rows()) == 20 + bool(options)
    assert torch.equal(cut.ctx.state.feature, whole.ctx.state.feature)


@pytest.mark.parametrize("options", [{}, PADDED])
def test_a_prefill_can_stand_behind_rows_that_are_there_or_begin_anew(native, options):
    whole, rest = (Story(world=make_world(native, **options), seed=9, length=20) for _ in range(2))
    group, there = whole.world.group, 8 + bool(options)
    data = whole.prefill().world.cache.read_rows(group, 0, whole.ctx.pages, 0, there)
    rest.ctx.token_ids += rest.tokens(1)
    rest.world.cache.write_rows(group, 0, rest.ctx.pages, 0, there, data)
    rest.world.drafter.prefill(rest.ctx, rest.rows(8, rest.target[8:]))
    assert torch.equal(rest.kv_rows(), whole.kv_rows())
    assert torch.equal(rest.ctx.state.feature, whole.ctx.state.feature)
    rest.world.drafter.prefill(rest.ctx, rest.rows(0, rest.target))
    assert torch.equal(rest.kv_rows(), whole.kv_rows())


@pytest.mark.parametrize("options", [{}, PADDED, UNSTABLE, {**UNSTABLE, **PADDED}])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_handoff_changes_no_proposal(native, temperature, options):
    here, there = (
        Story(world=make_world(native, page_size=size, **options), seed=10, length=21, temperature=temperature)
        for size in (8, 32)
    )
    here.prefill((8,))
    there.ctx.token_ids += there.tokens(1)
    rows, group = 21 + bool(options.get("padding")), here.world.group
    assert here.world.drafter.rows_at(21) == {group: rows}
    candidates, start = here.world.drafter.start(here.ctx)
    there.world.cache.write_rows(group, 0, there.ctx.pages, 0, rows,
                                 here.world.cache.read_rows(group, 0, here.ctx.pages, 0, rows))
    there.world.drafter.resume(there.ctx, candidates, {name: row.clone() for name, row in start.items()})
    for _ in range(5):
        ours = here.world.drafter.propose([here.ctx], [6])
        assert same_drafts(ours, there.world.drafter.propose([there.ctx], [6]))
        here.world.drafter.observe([here.verdict(ours[0])])
        there.world.drafter.observe([there.verdict(ours[0])])
        assert torch.equal(here.kv_rows(), there.kv_rows())


@pytest.mark.parametrize("options", [{}, {**UNSTABLE, **PADDED}])
def test_bits_do_not_depend_on_the_batch(native, options):
    trees, lengths, budgets = ["", "chain(4)", "static(2x2)"], [3, 17, 8], [6, 4, 6]

    def stories():
        world = make_world(native, **options)
        return world, [
            Story(world=world, seed=20 + i, length=n, temperature=0.8, tree=trees[i]).prefill()
            for i, n in enumerate(lengths)
        ]

    (together, batch), (alone, singles) = stories(), stories()
    for _ in range(5):
        drafts = together.drafter.propose([story.ctx for story in batch], budgets)
        single = [alone.drafter.propose([story.ctx], [n])[0] for story, n in zip(singles, budgets, strict=True)]
        assert same_drafts(drafts, single)
        together.drafter.observe([story.verdict(draft) for story, draft in zip(batch, drafts, strict=True)])
        for story, draft in reversed(list(zip(singles, single, strict=True))):
            alone.drafter.observe([story.verdict(draft)])
        for a, b in zip(batch, singles, strict=True):
            assert torch.equal(a.kv_rows(), b.kv_rows()) and torch.equal(a.ctx.state.feature, b.ctx.state.feature)


def test_unstable_kv_is_not_what_the_target_would_have_made(native):
    """The two ways differ, or comparing them would say nothing."""
    worlds = [make_world(native, tree="chain(4)", stable_kv=stable) for stable in (True, False)]
    ways = [Story(world=world, seed=3, length=9).prefill() for world in worlds]
    for _ in range(4):
        drafts = [story.world.drafter.propose([story.ctx], [4])[0] for story in ways]
        if not same_drafts(drafts[:1], drafts[1:]):
            return
        for story, draft in zip(ways, drafts, strict=True):
            story.world.drafter.observe([story.verdict(draft)])
    assert not torch.equal(ways[0].kv_rows(), ways[1].kv_rows())


def test_padding_is_part_of_the_fingerprint_and_what_stays_here_is_not(native):
    prints = {name: make_world(native, **options).drafter.fingerprint() for name, options in
              {"": {}, "padded": PADDED, "unstable": UNSTABLE, "threshold": {"threshold": 0.1}}.items()}
    assert prints[""] == prints["unstable"] == prints["threshold"] != prints["padded"]
    assert len({make_world(native, kind).drafter.fingerprint() for kind in HEADS}) == len(HEADS)


@pytest.mark.parametrize("padded", [False, True])
def test_the_last_positions_of_the_context_are_drafted_without_leaving_it(ops, padded):
    world = make_world(ops, page_size=32, padding=padded)
    story = Story(world=world, seed=14, length=TARGET.max_context - 3, tree="chain(8)")
    story.ctx.pages = story.ctx.pages + world.pool.allocate(5)
    (draft,) = world.drafter.propose([story.prefill().ctx], [8])
    assert draft.num_nodes == 4 - padded


def test_a_damaged_start_and_other_hidden_states_are_refused(ops):
    story = Story(world=make_world(ops), seed=12, length=5).prefill()
    drafter, (candidates, rows) = story.world.drafter, story.world.drafter.start(story.ctx)
    with pytest.raises(TransferDamaged, match="draft_start"):
        drafter.resume(story.ctx, candidates, {"feature": rows["feature"][:, :7]})
    with pytest.raises(ValueError, match="final hidden states"):
        drafter.prefill(story.ctx, HiddenRows(start=0, captured=story.target[:, None], final=None))


@pytest.mark.parametrize("tree", ["chain(3)", "static(3x2x1)"])
def test_drawn_drafts_have_the_law_of_every_inner_node(ops, tree):
    story = Story(world=make_world(ops), seed=15, length=6, temperature=0.7, tree=tree, verify=Verify.REJECTION)
    story.prefill()
    (draft,) = story.world.drafter.propose([story.ctx], [64])
    inner = set(draft.parents.tolist())
    assert inner <= set(draft.laws) and draft.num_nodes == (3 if tree == "chain(3)" else 15)
    for node in inner:
        path = paths(draft)[node] if node >= 0 else ()
        wanted = (PAPER.log_q(story.ctx.token_ids, story.target, path) / 0.7).log_softmax(-1)
        np.testing.assert_array_equal(draft.laws[node].token_ids, HEAD.target_ids.numpy())
        np.testing.assert_allclose(draft.laws[node].log_q, wanted.numpy(), atol=2e-4)


@pytest.mark.parametrize("tree", ["chain(2)", "static(2)"])
def test_the_ratio_rule_over_drawn_drafts_gives_exactly_the_target_s_law(native, tree):
    """Every outcome of drafting and judging, weighed; the second token's law is that of runs that took a child."""
    world = make_world(native, "small")
    story = Story(world=world, seed=16, length=6, temperature=0.9, tree=tree, verify=Verify.REJECTION).prefill()
    cells = sorted([*HEADS["small"].target_ids[1:].tolist(), 7, 9, 11])  # one draft id has no mass, three others have
    params = SamplingParams(temperature=1.0, verify=Verify.REJECTION)
    after = range(-1, TARGET.vocab_size)  # -1: the root
    target = {token: np.random.default_rng([6, token + 1]).dirichlet(np.ones(6)) for token in after}
    seconds: dict[int, dict[int, float]] = {}
    firsts: dict[int, float] = {}

    def run(chooser):
        story.ctx.other_chooser, story.ctx.state.first = chooser, None
        (draft,) = world.drafter.propose([story.ctx], [2])
        logits = torch.full((1 + draft.num_nodes, TARGET.vocab_size), -torch.inf)
        for row, token in zip(logits, [-1, *draft.token_ids.tolist()], strict=True):
            row[cells] = torch.from_numpy(np.log(target[token])).float()
        return verify(draft, logits, params, History.of(story.ctx.token_ids, ()), chooser, end_ids=(), max_new=2,
                      root_position=story.ctx.root_position).verdict.output_ids

    for outputs, weight in outcomes_of(run):
        firsts[outputs[0]] = firsts.get(outputs[0], 0.0) + weight
        for token in outputs[1:]:
            law = seconds.setdefault(outputs[0], {})
            law[token] = law.get(token, 0.0) + weight
    assert len(seconds) == 3
    for law, p in [(firsts, target[-1]), *((law, target[token]) for token, law in seconds.items())]:
        total = sum(law.values())
        np.testing.assert_allclose([law.get(cell, 0.0) / total for cell in cells], p, atol=1e-6)  # logits are float32
        assert set(law) <= set(cells)
