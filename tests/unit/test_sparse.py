"""Self-drafting over sparse KV against a dense float64 recompute under the same mask; that it reads no more than its
view, and that no verification reads its rows."""

from __future__ import annotations

import numpy as np
import pytest
from dense_llama import child_scores, paths
from sparse_world import ROWS, begin, extend, make_world, sparse_logits, view

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError, PdspecError
from pdspec.spec.sparse.config import View
from pdspec.types import GenerateRequest, SamplingParams


@pytest.mark.parametrize(
    ("changes", "committed", "selected", "prefix", "behind"),
    [
        ({}, 20, [], 3, [15, 16, 17, 18, 19]),
        ({}, 9, [], 3, [4, 5, 6, 7, 8]),
        ({}, 8, [], 8, []),  # sink and window meet
        ({}, 1, [], 1, []),
        ({"sink": 0}, 20, [], 0, [15, 16, 17, 18, 19]),
        ({"window": 0}, 20, [], 3, []),
        ({"sink": 0, "window": 0}, 20, [], 0, []),
        ({"window": 99}, 20, [], 20, []),
        ({}, 20, [1, 3, 8, 16], 4, [8, 15, 16, 17, 18, 19]),
        ({}, 20, list(range(15)), 20, []),
    ],
)
def test_what_a_view_sees(changes, committed, selected, prefix, behind):
    found = view(**changes).rows(committed, np.array(selected, np.int32))
    assert found[0] == prefix and found[1].tolist() == behind and found[1].dtype == np.int32


@pytest.mark.parametrize(
    ("values", "field"),
    [(("x", "1", "window", "99"), "sink"), (("1", "-1", "window", "99"), "window"), (("1", "1", "all", "99"), "select"),
     (("1", "1", "snapkv", "31"), "budget"), (("1", "9999999", "window", "99"), "window")],
)
def test_options_that_make_no_sense_are_refused(values, field):
    with pytest.raises(ConfigError, match=rf"options\.sparse:{field}"):
        View.parse(*values)
    with pytest.raises(ConfigError, match=r"options\.sparse:window"):
        LocalGenerator(WorkerConfig(model="tiny", drafters=("sparse",), drafter="sparse",
                                    options={"sparse:window": "many"}))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_chain_is_the_best_by_a_dense_recompute_under_the_mask(ops, temperature):
    """Also after verifications, which move the window; rows outside the view are NaN while drafting."""
    world = make_world(ops)
    ctx = begin(world, 2, 30, temperature=temperature)
    for _ in range(3):
        root = ctx.root_position
        seen = {*range(3), *range(root - 5, root)}
        kept = [world.cache.read_rows("target", layer, ctx.pages, 3, root - 5) for layer in range(4)]
        world.cache.poison(None, ctx.pages, 3, root - 5)
        world.cache.poison(None, ctx.pages, root, ROWS)
        (draft,) = world.drafter.propose([ctx], [4])
        assert draft.parents.tolist() == [-1, 0, 1, 2]
        path = ()
        for depth, (token, log_q) in enumerate(zip(draft.token_ids.tolist(), draft.log_q.tolist(), strict=True), 1):
            logits = sparse_logits(ctx, path, seen)
            assert token == int(child_scores(logits, ctx, depth).argmax())
            assert log_q == pytest.approx(float((logits / (temperature or 1)).log_softmax(-1)[token]), abs=1e-3)
            path = (*path, token)
        for layer, rows in enumerate(kept):
            world.cache.write_rows("target", layer, ctx.pages, 3, root - 5, rows)
        ctx.token_ids += [path[0], path[1], 77]
        extend(world, ctx, root)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_tree_has_the_best_children_under_the_mask(ops, temperature):
    world = make_world(ops)
    batch = [begin(world, seed, 20 + seed, temperature=temperature, tree="static(3x2x1)") for seed in (3, 9)]
    for ctx, draft in zip(batch, world.drafter.propose(batch, [64, 64]), strict=True):
        every, root = paths(draft), ctx.root_position
        assert len(every) == 15
        for node, path in enumerate(every):
            siblings = [i for i in range(15) if draft.parents[i] == draft.parents[node]]
            logits = sparse_logits(ctx, path[:-1], {*range(3), *range(root - 5, root)})
            order = child_scores(logits, ctx, len(path)).argsort(descending=True)
            assert path[-1] == int(order[siblings.index(node)])


def test_a_batch_is_each_sequence_alone_to_the_bit(native):
    world = make_world(native)
    cases = ((1, 1, "chain(3)"), (2, 13, "dynamic(3,3,6)"), (3, 40, "static(2x2x1)"))
    batch = [begin(world, seed, n, temperature=0.8, tree=tree) for seed, n, tree in cases]
    together = world.drafter.propose(batch, [6, 0, 4])
    for ctx, budget, draft in zip(batch, (6, 0, 4), together, strict=True):
        (alone,) = world.drafter.propose([ctx], [budget])
        for name in ("token_ids", "parents", "log_q", "survival"):
            assert np.array_equal(getattr(alone, name), getattr(draft, name))
    assert [draft.num_nodes for draft in together] == [3, 0, 4]


def test_drawn_children_have_the_law_they_were_drawn_from(native):
    world = make_world(native)
    ctx = begin(world, 5, 30, temperature=0.9, tree="static(2x2)", verify="rejection")
    (draft,) = world.drafter.propose([ctx], [64])
    every, root = paths(draft), ctx.root_position
    assert {int(parent) for parent in draft.parents} <= draft.laws.keys()
    for node, law in draft.laws.items():
        path = () if node < 0 else every[node]
        logits = sparse_logits(ctx, path, {*range(3), *range(root - 5, root)})
        np.testing.assert_allclose(law.log_q, (logits / 0.9).log_softmax(-1).numpy(), atol=1e-3)


# --- inside the engine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["window", "snapkv"])
def local(request):
    options = {"sparse:sink": "2", "sparse:window": "6", "sparse:select": request.param, "sparse:budget": "32"}
    generator = LocalGenerator(WorkerConfig(
        model="tiny-1", dtype="float32", drafters=("none", "sparse"), drafter="sparse", options=options, threads=1,
        cache_tokens=2048, chunk=16, poison=True,
    ))
    yield generator
    generator.resources.close()


def answer(local, drafter="sparse", tree="dynamic(3,3,6)", **sampling):
    params = SamplingParams(max_tokens=40, seed=2, ignore_eos=True, **sampling)
    ids = tuple((5 * i * i + 3) % 256 for i in range(50))
    asked = GenerateRequest(request_id="a", prompt_ids=ids, drafter=drafter, tree=tree, sampling=params)
    chunks = list(local.generate(asked))
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].stats


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}, {"temperature": 1.0, "verify": "rejection"}])
def test_no_verification_reads_a_sparse_row(local, monkeypatch, sampling):
    """All that a proposal wrote becomes NaN before the target's forward: nothing changes."""
    drafter, cache = local.resources.drafters["sparse"], local.resources.cache
    real, clean = drafter.propose, answer(local, **sampling)
    poisoned = []

    def propose(batch, budgets):
        drafts = real(batch, budgets)
        for ctx in batch:
            stop = min(ctx.root_position + 1 + drafter.max_nodes, len(ctx.pages) * cache.page_size)
            cache.poison("target", ctx.pages, ctx.root_position, stop)
            poisoned.append(stop - ctx.root_position)
        return drafts

    monkeypatch.setattr(drafter, "propose", propose)
    tokens, stats = answer(local, **sampling)
    assert tokens == clean[0] and stats.accepted_tokens == clean[1].accepted_tokens > 0
    assert len(poisoned) >= stats.verifications - 1 and min(poisoned) > 6
    if sampling.get("verify") != "rejection":
        assert tokens == answer(local, "none", "", **sampling)[0]


def test_a_committed_row_that_was_damaged_is_noticed(local, monkeypatch):
    """The control of the test above."""
    drafter, cache = local.resources.drafters["sparse"], local.resources.cache
    real = drafter.propose

    def propose(batch, budgets):
        drafts = real(batch, budgets)
        for ctx in batch:
            cache.poison("target", ctx.pages, ctx.root_position - 1, ctx.root_position)
        return drafts

    monkeypatch.setattr(drafter, "propose", propose)
    with pytest.raises(PdspecError):
        answer(local)
