"""Tree growth on tables of scores: ranking, ties, pruning that changes nothing, and rows that are nobody else's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdspec.errors import PdspecError
from pdspec.spec.growth import Growth, Ranked, expansions, rank_children, width
from pdspec.spec.tree import parse_tree

IDS = np.arange(100, 164, dtype=np.int64)


def table(seed: int, coarse: bool):
    """Scores of 12 children by path; coarse ones are full of ties."""

    def row(path):
        scores = np.random.default_rng([seed, len(path), *path]).standard_normal(12).astype(np.float32)
        return np.round(scores * 2) / 2 - 2 if coarse else scores - 3

    return row


def ranked(rows, count) -> Ranked:
    scores = np.stack(rows)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(scores, best, 1)
    return Ranked(token_ids=best.astype(np.int32), log_q=values, score=values)


def paths(draft):
    found = []
    for token, parent in zip(draft.token_ids.tolist(), draft.parents.tolist(), strict=True):
        found.append((*found[parent], token) if parent >= 0 else (token,))
    return found


def grow(row, spec, budget, max_depth=99):
    growth = Growth(spec, budget, ranked([row(())], 16), max_depth)
    of_node, expanded = {}, 0
    while frontier := growth.frontier():
        for node in frontier:
            parent = growth.parent(node)
            of_node[node] = (*of_node.get(parent, ()), growth.token(node))
            slots = growth.path(node)
            assert len(slots) == len(of_node[node]) and slots[-1] == expanded
            expanded += 1
        growth.add(frontier, ranked([row(of_node[node]) for node in frontier], width(spec)))
    return growth.draft(), expanded


def expand_all(row, depth, top_k, nodes):
    """EAGLE-2 without any pruning; ties to the shallower, then to the one made first."""
    made, frontier = [], [((), 0.0)]
    for _ in range(depth):
        children = []
        for path, above in frontier:
            scores = row(path)
            for token in np.argsort(-scores, kind="stable")[:top_k].tolist():
                children.append(((*path, token), np.float32(above) + min(scores[token], np.float32(0))))
        made += children
        frontier = sorted(children, key=lambda child: -child[1])[:top_k]
    return {path for path, _ in sorted(made, key=lambda child: (-child[1], len(child[0])))[:nodes]}


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("spec", ["dynamic(4,4,8)", "dynamic(6,3,20)", "dynamic(1,8,8)", "dynamic(5,1,5)", "chain(4)"])
def test_growth_without_hopeless_expansions_finds_the_same_tree(spec, coarse):
    tree = parse_tree(spec)
    for seed in range(40):
        for budget in (1, 2, 5, tree.max_nodes, 99):
            draft, expanded = grow(table(seed, coarse), tree, budget)
            nodes = min(budget, tree.max_nodes)
            found = paths(draft)
            assert set(found) == expand_all(table(seed, coarse), tree.depth, width(tree), nodes)
            assert len(found) == len(set(found)) == nodes and expanded <= expansions(tree)
            assert (draft.parents < np.arange(nodes)).all()
            above = np.where(draft.parents < 0, 1.0, draft.survival[draft.parents])
            assert (draft.survival <= above).all()


def test_a_static_tree_under_a_budget_keeps_its_best_nodes():
    row, tree = table(1, False), parse_tree("static(mc_sim_7b_63)")
    whole, _ = grow(row, tree, 99)
    assert sorted(whole.parents.tolist()) == sorted(tree.parents)
    part, expanded = grow(row, tree, 6)
    best = sorted(zip(-whole.survival, range(whole.num_nodes), strict=True))[:6]
    assert set(paths(part)) == {paths(whole)[node] for _, node in best}
    assert expanded < expansions(tree)


def test_no_budget_is_no_tree_and_depth_is_bounded():
    row, tree = table(2, False), parse_tree("dynamic(4,4,8)")
    assert grow(row, tree, 0)[0].num_nodes == 0 and grow(row, tree, -1)[0].num_nodes == 0
    assert max(map(len, paths(grow(row, tree, 8, max_depth=2)[0]))) == 2


def test_ranking_breaks_ties_by_draft_id_and_maps_to_target_ids():
    logits = torch.zeros(1, 64)
    logits[0, 40] = 1.0
    best = rank_children(logits, 0.0, None, IDS, 5)
    assert best.token_ids.tolist() == [[140, 100, 101, 102, 103]]
    assert rank_children(torch.zeros(1, 64), 0.0, None, IDS, 1).token_ids.tolist() == [[100]]
    np.testing.assert_array_equal(best.score, best.log_q)
    assert float(np.exp(best.log_q[0, 0])) == pytest.approx(np.e / (63 + np.e))


def test_scores_are_normalised_with_the_noise_and_log_q_without():
    logits, noise = torch.randn(2, 64), torch.randn(64)
    best = rank_children(logits, 0.5, noise, IDS, 64)
    np.testing.assert_allclose(np.exp(best.score).sum(1), 1, rtol=1e-5)
    order = best.token_ids - 100
    log_q = (logits / 0.5).log_softmax(-1)
    np.testing.assert_allclose(best.log_q, log_q.gather(1, torch.from_numpy(order).long()), atol=1e-5)
    assert order[0].tolist() == (log_q[0] + noise).argsort(descending=True).tolist()


@pytest.mark.parametrize("vocabulary", [64, 1000, 4096])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_ranks_the_same_beside_any_others(vocabulary, temperature):
    logits, noise = torch.randn(33, vocabulary), torch.randn(vocabulary)
    ids = np.arange(vocabulary)
    every = rank_children(logits, temperature, noise, ids, 8)
    for rows in ([0], [7], [32], [3, 4], list(range(5, 21))):
        some = rank_children(logits[rows], temperature, noise, ids, 8)
        for name in ("token_ids", "log_q", "score"):
            assert np.array_equal(getattr(some, name), getattr(every, name)[rows])


def test_scores_that_are_no_numbers_are_an_error():
    logits = torch.zeros(2, 64)
    logits[1, 3] = torch.nan
    with pytest.raises(PdspecError, match="not numbers"):
        rank_children(logits, 0.0, None, IDS, 4)
