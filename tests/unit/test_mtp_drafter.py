"""The MTP drafter against the report: every module's KV, and the scores that trees are made of, after the prefill and
after verifications."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from mtp_reference import EMBEDDING, LM_HEAD, TARGET, Story, child_scores, make_world, paths

from pdspec.errors import InvalidRequest, TransferDamaged
from pdspec.sampling import History
from pdspec.spec.chooser import Seeded
from pdspec.spec.mtp.drafter import MtpDrafter
from pdspec.spec.protocol import HiddenRows, Verdict
from pdspec.spec.verify import verify
from pdspec.study.mtp_reference import PaperMtp
from pdspec.types import SamplingParams, Verify

GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8)
BAR = 1e-4


def paper_of(world, *, shift=0):
    return PaperMtp(world.head, EMBEDDING, LM_HEAD, shift=shift)


def same_drafts(a, b) -> bool:
    names = ("token_ids", "parents", "log_q", "survival")
    return all(np.array_equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names)


def difference(story, paper) -> float:
    """Of every module's KV and of the first draft token's logits from a recompute from the committed tokens alone."""
    kv, found = paper.committed(story.ctx.token_ids, story.final), story.kv_rows()
    assert len(kv) == len(found) and [len(rows) for rows in kv] == [len(rows) for rows in found]
    logits = story.world.drafter.model.logits(story.ctx.state.feature)[0].double()
    apart = [(a.double() - b).abs().max() for a, b in zip(found, kv, strict=True) if len(a)]
    apart.append((logits - paper.logits(story.ctx.token_ids, story.final, ())).abs().max())
    largest = torch.stack(apart).max()
    return float("inf") if largest.isnan() else float(largest)


def check_log_q(story, draft, paper) -> int:
    """Every node of a draft has the report's log q, and children that the noise makes the best."""
    ctx, world = story.ctx, story.world
    where = {token: index for index, token in enumerate(world.head.target_ids.tolist())}
    temperature = ctx.sampling.temperature or 1.0
    inner = {}
    for node, path in enumerate(paths(draft)):
        inner.setdefault(path[:-1], []).append(node)
    for path, nodes in inner.items():
        logits, children = paper(ctx.token_ids, story.final, path), draft.token_ids[nodes].tolist()
        expected = (logits / temperature).log_softmax(-1)[[where[token] for token in children]]
        np.testing.assert_allclose(draft.log_q[nodes], expected.numpy(), atol=BAR)
        score = child_scores(logits, ctx, world.head.target_ids, len(path) + 1)
        assert children == world.head.target_ids[score.topk(len(children)).indices].tolist()
    return max((len(path) for path in paths(draft)), default=0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("modules", "trees"), [
    (1, ("chain(1)", "static(4)", "dynamic(1,3,3)")),
    (2, ("", "static(2x2)", "dynamic(2,3,6)")),
    (3, ("chain(3)", "static(2x2x2)", "dynamic(3,3,8)")),
])
def test_after_the_prefill_and_each_of_20_verifications_state_equals_a_recompute(ops, modules, trees, sampling):
    world = make_world(ops, modules)
    paper, shifted = paper_of(world), paper_of(world, shift=1)
    stories = [
        Story(world=world, seed=seed, length=n, sampling=sampling, tree=tree).prefill()
        for seed, n, tree in zip((1, 2, 3), (1, 2, 21), trees, strict=True)
    ]
    deepest, accepted = 0, set()
    for turn in range(21):
        for story in stories:
            assert difference(story, paper) <= BAR
            assert difference(story, shifted) > 100 * BAR, "an input unshifted by one went unnoticed"
        drafts = world.drafter.propose([story.ctx for story in stories], [8, 8, 8])
        if turn % 5 == 0:
            for story, draft in zip(stories, drafts, strict=True):
                deepest = max(deepest, check_log_q(story, draft, paper.logits))
        news = [story.verdict(draft) for story, draft in zip(stories, drafts, strict=True)]
        accepted |= {verdict.num_accepted for _, verdict, _ in news}
        world.drafter.observe(news)
    assert deepest == modules and accepted == set(range(modules + 1))


def _unshifted(self, ctx, m, count, real=MtpDrafter._committed_rows):
    rows = real(self, ctx, m, count)
    return replace(rows, token_ids=ctx.token_ids[rows.slots.start + m - 1 : rows.slots.stop + m - 1])


def _one_position_on(self, ctx, m, count, real=MtpDrafter._committed_rows):
    rows = real(self, ctx, m, count)
    return replace(rows, positions=[position + 1 for position in rows.positions])


def _previous_token(self, ctx, growth, frontier, depth, real=MtpDrafter._nodes):
    rows = real(self, ctx, growth, frontier, depth)
    return replace(rows, token_ids=[ctx.token_ids[-1]] * len(rows.slots))


def _without_ancestors(self, ctx, growth, frontier, depth, real=MtpDrafter._nodes):
    rows = real(self, ctx, growth, frontier, depth)
    return replace(rows, paths=[path[-1:] for path in rows.paths])


@pytest.mark.parametrize(("method", "mutation", "seen_in"), [
    ("_committed_rows", _unshifted, "state"), ("_committed_rows", _one_position_on, "state"),
    ("_nodes", _previous_token, "trees"), ("_nodes", _without_ancestors, "trees"), ("", None, "nothing"),
])
def test_what_is_wrong_by_one_is_caught(native, monkeypatch, method, mutation, seen_in):
    if mutation:
        monkeypatch.setattr(MtpDrafter, method, mutation)
    world = make_world(native, 3)
    paper = paper_of(world)
    story = Story(world=world, seed=3, length=21, tree="chain(3)").prefill()
    assert (difference(story, paper) > 100 * BAR) == (seen_in == "state")
    (draft,) = world.drafter.propose([story.ctx], [3])
    if seen_in == "nothing":
        assert check_log_q(story, draft, paper.logits) == 3
    else:
        with pytest.raises(AssertionError):
            check_log_q(story, draft, paper.logits)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_four_modules_draft_from_prompts_that_are_shorter_than_they_reach(ops, length):
    world = make_world(ops, 4)
    paper = paper_of(world)
    story = Story(world=world, seed=length, length=length, tree="static(2x1x2x2)").prefill()
    for _ in range(5):
        assert difference(story, paper) <= BAR
        (draft,) = world.drafter.propose([story.ctx], [64])
        assert check_log_q(story, draft, paper.logits) == 4 and draft.num_nodes == 2 + 2 + 4 + 8
        world.drafter.observe([story.verdict(draft)])


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_the_index_table(modules, native):
    """DESIGN 4: n+1-m rows of module m at Done, n+a+2-m after a accepted drafts."""
    world = make_world(native, modules)
    story = Story(world=world, seed=1, length=9).prefill()
    names = [f"draft/mtp/{m - 1}" for m in range(1, modules + 1)]
    assert world.drafter.rows_at(9) == {name: 9 + 1 - m for m, name in enumerate(names, 1)}
    assert world.drafter.rows_at(1) == {name: max(0, 2 - m) for m, name in enumerate(names, 1)}
    _, rows = world.drafter.start(story.ctx)
    if modules == 1:
        assert rows == {}
    else:
        assert rows["hidden"].shape == (modules - 1, TARGET.hidden_size)
        paper, features = paper_of(world), story.final.double()
        for m in range(1, modules):
            _, features = paper.module(m, story.ctx.token_ids[m:], features[: 10 - m])
            # h^{m'-1}_{n-m'+1} of m' = m+1
            torch.testing.assert_close(rows["hidden"][m - 1].double(), features[9 - (m + 1) + 1], atol=BAR, rtol=0)
    (draft,) = world.drafter.propose([story.ctx], [modules])
    for a in range(modules + 1):
        ctx = replace(story.ctx, token_ids=list(story.ctx.token_ids), state=replace(story.ctx.state))
        outputs = [*draft.token_ids[:a].tolist(), 5]
        ctx.token_ids += outputs
        hidden = HiddenRows(start=9, captured=None, final=story.hidden(a + 1))
        world.drafter.observe([(ctx, Verdict(path=tuple(range(a)), output_ids=tuple(outputs)), hidden)])
        after = world.drafter.rows_at(ctx.root_position)
        assert after == {name: 9 + a + 2 - m for m, name in enumerate(names, 1)}
        for name, count in after.items():
            written = bytearray(world.cache.read_rows(name, 0, ctx.pages, 0, count))
            assert not torch.frombuffer(written, dtype=torch.float32).isnan().any()


@pytest.mark.parametrize("cuts", [(1,), (8,), (3, 4, 19), tuple(range(1, 20))])
@pytest.mark.parametrize("early_last", [False, True])
def test_chunked_prefill_is_unchunked_prefill_to_the_bit(native, cuts, early_last):
    whole, cut = (Story(world=make_world(native, 3), seed=9, length=20) for _ in range(2))
    whole.prefill()
    cut.prefill(cuts, early_last=early_last)
    assert cut.ctx.token_ids == whole.ctx.token_ids
    assert all(torch.equal(a, b) for a, b in zip(cut.kv_rows(), whole.kv_rows(), strict=True))
    torch.testing.assert_close(cut.ctx.state.feature, whole.ctx.state.feature, atol=0, rtol=0, equal_nan=True)


def test_a_chunk_ends_with_the_rows_of_the_table_and_a_row_waits_for_its_token(native):
    world = make_world(native, 3)
    story = Story(world=world, seed=9, length=12)
    world.drafter.prefill(story.ctx, HiddenRows(start=0, captured=None, final=story.final[:7]))
    assert story.ctx.state.rows == 7 and story.ctx.state.waiting is None
    assert all(rows.isnan().logical_not().all() for rows in _rows(story, world.drafter.rows_at(7)))
    world.drafter.prefill(story.ctx, HiddenRows(start=7, captured=None, final=story.final[7:]))
    assert story.ctx.state.rows == 11 and story.ctx.state.waiting.shape == (1, TARGET.hidden_size)
    with pytest.raises(ValueError, match="hidden rows"):
        world.drafter.prefill(story.ctx, HiddenRows(start=11, captured=None, final=story.final[11:]))
    fresh = Story(world=world, seed=3, length=12)
    with pytest.raises(ValueError, match="final hidden state"):
        world.drafter.prefill(fresh.ctx, HiddenRows(start=0, captured=fresh.final[:, None], final=None))


def _rows(story, counts):
    for name, count in counts.items():
        data = story.world.cache.read_rows(name, 0, story.ctx.pages, 0, count)
        yield torch.frombuffer(bytearray(data), dtype=torch.float32)


def test_a_prefill_can_begin_anew(native):
    whole, again = (Story(world=make_world(native, 3), seed=9, length=20) for _ in range(2))
    again.world.drafter.prefill(again.ctx, HiddenRows(start=0, captured=None, final=again.final[:7] + 1))
    again.prefill((4,))
    assert all(torch.equal(a, b) for a, b in zip(again.kv_rows(), whole.prefill().kv_rows(), strict=True))


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2, 3)])
@pytest.mark.parametrize("known", [3, 5, 8])
def test_a_prefill_can_begin_behind_rows_that_are_in_the_pages(native, known, cuts):
    """N hidden rows before the cut make all that another beginning's tokens have left out, and the same bits."""
    whole, again = (Story(world=make_world(native, 3), seed=9, length=20) for _ in range(2))
    whole.prefill()
    again.ctx.token_ids.append(whole.ctx.token_ids[-1])
    other = replace(again.ctx, token_ids=[*again.ctx.token_ids[:known], *range(21 - known)], state=None)
    again.world.drafter.prefill(other, HiddenRows(start=0, captured=None, final=again.final))
    start = known - again.world.drafter.carry
    edges = [start, *(start + cut for cut in cuts), len(again.final)]
    for first, stop in pairwise(edges):
        again.world.drafter.prefill(again.ctx, HiddenRows(start=first, captured=None, final=again.final[first:stop]))
    assert all(torch.equal(a, b) for a, b in zip(again.kv_rows(), whole.kv_rows(), strict=True))
    assert torch.equal(again.ctx.state.feature[0, :2], whole.ctx.state.feature[0, :2])


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_bits_do_not_depend_on_the_batch(native, sampling):
    lengths, budgets = [3, 17, 1, 40, 9], [6, 3, 6, 8, 0]
    trees = ["", "chain(2)", "static(2x2x1)", "dynamic(3,4,8)", "dynamic(2,2,4)"]

    def stories():
        world = make_world(native, 3)
        return world, [
            Story(world=world, seed=20 + i, length=n, sampling=sampling, tree=trees[i]).prefill()
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
            assert all(torch.equal(x, y) for x, y in zip(a.kv_rows(), b.kv_rows(), strict=True))


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 21])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_handoff_changes_no_proposal(native, modules, length, sampling):
    here = Story(world=make_world(native, modules), seed=10, length=length, sampling=sampling).prefill()
    there = Story(world=make_world(native, modules, page_size=32), seed=10, length=length, sampling=sampling)
    there.ctx.token_ids += there.tokens(1)
    candidates, rows = here.world.drafter.start(here.ctx)
    for name, count in here.world.drafter.rows_at(length).items():
        data = here.world.cache.read_rows(name, 0, here.ctx.pages, 0, count)
        there.world.cache.write_rows(name, 0, there.ctx.pages, 0, count, data)
    there.world.drafter.resume(there.ctx, candidates, {name: row.clone() for name, row in rows.items()})
    assert here.world.drafter.fingerprint() == there.world.drafter.fingerprint()
    for _ in range(5):
        ours = here.world.drafter.propose([here.ctx], [6])
        assert ours[0].num_nodes == modules
        assert same_drafts(ours, there.world.drafter.propose([there.ctx], [6]))
        here.world.drafter.observe([here.verdict(ours[0])])
        there.world.drafter.observe([there.verdict(ours[0])])
        assert all(torch.equal(a, b) for a, b in zip(here.kv_rows(), there.kv_rows(), strict=True))


def test_first_tokens_are_the_best_by_log_q_plus_noise_with_room_for_the_tree(ops):
    world = make_world(ops, 2)
    for tree, count in (("chain(2)", 16), ("dynamic(2,20,30)", 20), ("static(18x1)", 18)):
        story = Story(world=world, seed=11, length=5, sampling=SAMPLED, tree=tree).prefill()
        candidates, _ = world.drafter.start(story.ctx)
        logits = paper_of(world).logits(story.ctx.token_ids, story.final, ())
        best = child_scores(logits, story.ctx, world.head.target_ids, 1).topk(count)
        assert candidates.token_ids.tolist() == world.head.target_ids[best.indices].tolist()
        np.testing.assert_allclose(candidates.score, best.values.numpy(), atol=BAR)
        log_q = (logits / 0.8).log_softmax(-1)
        np.testing.assert_allclose(candidates.log_q, log_q[best.indices].numpy(), atol=BAR)


def test_a_damaged_start_is_refused(native):
    world = make_world(native, 3)
    story = Story(world=world, seed=12, length=5).prefill()
    candidates, rows = world.drafter.start(story.ctx)
    short, hidden = replace(candidates, token_ids=candidates.token_ids[:3]), rows["hidden"]
    bad = [(None, rows), (short, rows), (candidates, {})]
    bad += [(candidates, {"hidden": part}) for part in (hidden[:, :7], hidden[:1], hidden[None], hidden.repeat(2, 1))]
    for what in bad:
        with pytest.raises(TransferDamaged, match="draft_start"):
            world.drafter.resume(story.ctx, *what)


def test_other_peoples_rows_are_refused(native):
    world = make_world(native, 2)
    story = Story(world=world, seed=13, length=5).prefill()
    (draft,) = world.drafter.propose([story.ctx], [6])
    ctx, verdict, hidden = story.verdict(draft)
    wrong = [
        (verdict, replace(hidden, start=hidden.start + 1)),
        (verdict, replace(hidden, final=torch.cat((hidden.final, hidden.final)))),
        (Verdict(path=(*verdict.path, 1), output_ids=verdict.output_ids), hidden),
    ]
    for bad_verdict, bad_hidden in wrong:
        with pytest.raises(ValueError, match="hidden rows"):
            world.drafter.observe([(ctx, bad_verdict, bad_hidden)])
    with pytest.raises(ValueError, match="draft rows with the root"):
        world.drafter.propose([ctx], [6])


def test_a_tree_deeper_than_there_are_modules_is_refused_with_the_remedy(native):
    drafter = make_world(native, 2).drafter
    assert drafter.default_tree == "chain(2)" and drafter.depth("") == 2 and drafter.depth("static(2x2)") == 2
    for tree in ("chain(3)", "static(2x2x1)", "dynamic(3,2,4)"):
        with pytest.raises(InvalidRequest, match=r"tree: .*2 MTP modules.*2 or below.*mtp:reuse"):
            drafter.depth(tree)
    assert make_world(native, 2, reuse=True).drafter.depth("dynamic(5,4,8)") == 5


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_one_module_can_draft_every_depth(ops, sampling):
    world = make_world(ops, 2, reuse=True)
    assert [group.name for group in world.drafter.groups] == ["draft/mtp/0"]
    paper = paper_of(world)
    stories = [
        Story(world=world, seed=4 + i, length=11 * i + 1, sampling=sampling, tree=tree).prefill()
        for i, tree in enumerate(("chain(5)", "static(2x2x1x1)", "dynamic(4,3,8)"))
    ]
    for _ in range(4):
        drafts = world.drafter.propose([story.ctx for story in stories], [16, 16, 16])
        for story, draft in zip(stories, drafts, strict=True):
            kv, _ = paper.module(1, story.ctx.token_ids[1:], story.final.double())
            torch.testing.assert_close(story.kv_rows()[0].double(), kv, atol=BAR, rtol=0)
            check_log_q(story, draft, paper.reused_logits)
        assert max(map(len, paths(drafts[0]))) == 5
        world.drafter.observe([story.verdict(draft) for story, draft in zip(stories, drafts, strict=True)])


def test_a_whole_vocabulary_is_the_target_s_own_lm_head(native):
    world = make_world(native, 2, draft_vocab=TARGET.vocab_size)
    assert world.head.target_ids.tolist() == list(range(TARGET.vocab_size))
    story = Story(world=world, seed=2, length=9).prefill()
    assert difference(story, paper_of(world)) <= BAR
    (draft,) = world.drafter.propose([story.ctx], [2])
    assert check_log_q(story, draft, paper_of(world).logits) == 2


@pytest.mark.parametrize("tree", ["chain(3)", "static(3x2x2)", "dynamic(3,3,7)"])
def test_rejection_gets_the_law_of_every_inner_node_and_verify_takes_it(native, tree):
    sampling = SamplingParams(temperature=1.0, verify=Verify.REJECTION, seed=1)
    world = make_world(native, 3)
    paper, ids = paper_of(world), world.head.target_ids.tolist()
    story = Story(world=world, seed=8, length=7, sampling=sampling, tree=tree).prefill()
    for turn in range(4):
        if turn == 0:  # the law of the first tokens is cut to those that are shipped
            world.drafter.resume(story.ctx, *world.drafter.start(story.ctx))
        (draft,) = world.drafter.propose([story.ctx], [21])
        drawn = not tree.startswith("dynamic")
        assert draft.laws.keys() == (set(draft.parents.tolist()) if drawn else set())
        for node, law in draft.laws.items():
            path = paths(draft)[node] if node >= 0 else ()
            log_q = paper.logits(story.ctx.token_ids, story.final, path).log_softmax(-1)
            log_q = log_q[[ids.index(token) for token in law.token_ids.tolist()]].log_softmax(-1)
            assert len(law.token_ids) == (16 if turn == 0 and node < 0 else 60)
            np.testing.assert_allclose(law.log_q, log_q.numpy(), atol=BAR)
        logits = story.random.normal(0, 1, (1 + draft.num_nodes, TARGET.vocab_size)).astype(np.float32)
        result = verify(draft, torch.from_numpy(logits), sampling, History.of(story.ctx.token_ids, ()), Seeded(1, 0),
                        root_position=story.ctx.root_position, end_ids=(), max_new=9)
        outputs = result.verdict.output_ids
        assert outputs[:-1] == tuple(draft.token_ids[list(result.verdict.path)].tolist())
        world.drafter.observe([story.verdict(draft)])


def test_drawn_first_tokens_follow_q(native):
    """Over 3000 seeds the first draft token has q's frequencies (chi-square, 59 degrees: 1e-6 lies at 134)."""
    world = make_world(native, 2)
    sampling = SamplingParams(temperature=1.0, verify=Verify.REJECTION)
    story = Story(world=world, seed=8, length=7, sampling=sampling, tree="chain(1)").prefill()
    q = paper_of(world).logits(story.ctx.token_ids, story.final, ()).softmax(-1).numpy()
    counts, where = np.zeros(len(q)), {token: i for i, token in enumerate(world.head.target_ids.tolist())}
    many = [replace(story.ctx, noise_key=(seed, 0), state=replace(story.ctx.state)) for seed in range(3000)]
    for draft in world.drafter.propose(many, [1] * len(many)):
        counts[where[int(draft.token_ids[0])]] += 1
    assert ((counts - 3000 * q) ** 2 / (3000 * q)).sum() < 134
