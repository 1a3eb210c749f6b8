import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdspec.errors import ConfigError, InvalidRequest, UnknownName
from pdspec.spec.protocol import Draft, empty_draft
from pdspec.spec.shapes import PUBLISHED
from pdspec.spec.tree import (
    ChainTree,
    DynamicTree,
    StaticTree,
    ancestor_lists,
    depths,
    parse_tree,
    prune,
    read_shapes,
    select_nodes,
    spelled_out,
    tree_rows,
)

parents_of_any_tree = st.integers(0, 24).flatmap(
    lambda size: st.tuples(*[st.integers(-1, node - 1) for node in range(size)])
).map(lambda parents: np.array(parents, np.int32))


def draft_of(parents, survival=None) -> Draft:
    size = len(parents)
    return Draft(
        token_ids=np.arange(100, 100 + size, dtype=np.int32), parents=np.array(parents, np.int32),
        log_q=np.linspace(-1, 0, size, dtype=np.float32),
        survival=np.ones(size, np.float32) if survival is None else np.array(survival, np.float32),
    )


def path_of(parents, node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = int(parents[node])
    return path


def test_chain_and_dynamic():
    assert parse_tree("chain(7)") == ChainTree(depth=7)
    assert parse_tree(" dynamic( 4, 4 ,8 )") == DynamicTree(depth=4, top_k=4, nodes=8)
    assert parse_tree("dynamic(4,4,8)").max_nodes == 8
    assert parse_tree("chain(7)").max_nodes == 7


def test_static_product_shape():
    tree = parse_tree("static(3x2x1)")
    assert tree == StaticTree(
        parents=(-1, -1, -1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8), ranks=(0, 1, 2, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0)
    )
    assert (tree.max_nodes, tree.depth) == (15, 3)


def test_published_eagle_tree():
    tree = parse_tree("static(mc_sim_7b_63)")
    assert (tree.max_nodes, tree.depth) == (25, 5)
    assert np.bincount(depths(np.array(tree.parents, np.int32))).tolist() == [0, 4, 8, 8, 3, 2]
    ranks = [[tree.ranks[n] for n in path_of(tree.parents, node)] for node in range(25)]
    assert ranks[:4] == [[0], [1], [2], [3]] and ranks[11] == [3, 0] and ranks[19] == [1, 0, 0]
    assert ranks[-3:] == [[0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "mc_sim_7b_63"])
def test_published_medusa_trees_have_63_nodes_for_at_most_4_heads(name):
    tree = parse_tree(f"static({name})")
    assert tree.max_nodes == 63 and tree.depth == (3 if name == "vicuna_33b_stage1" else 4)
    assert max(tree.ranks) == 9


def test_a_shape_may_be_spelled_out_in_any_order():
    tree = parse_tree("static(0.0 1 0  0.1 1.0 0.1.0)")
    assert tree == parse_tree("static(0 1 0.0 0.1 1.0 0.1.0)")
    assert tree == StaticTree(parents=(-1, -1, 0, 0, 1, 3), ranks=(0, 1, 0, 1, 0, 0))
    assert parse_tree("static(0 1 0.0 0.1 1.0 1.1)") == parse_tree("static(2x2)")


def test_a_deployment_s_shapes_come_from_files_under_names(tmp_path):
    files = {"pine": [[0], [0, 0], [1]], "stick": [[0]]}
    for name, paths in files.items():
        (tmp_path / name).write_text(json.dumps(paths))
    shapes = read_shapes({name: str(tmp_path / name) for name in files})
    assert parse_tree(spelled_out(" static( pine )", shapes)) == StaticTree(parents=(-1, -1, 0), ranks=(0, 1, 0))
    assert parse_tree(spelled_out("static(stick)", shapes)).max_nodes == 1
    for text in ("static(oak)", "static(2x2)", "chain(2)", "pine"):
        assert spelled_out(text, shapes) == text
    with pytest.raises(UnknownName):
        parse_tree("static(pine)")


NO_TREES = ("", "{}", "[]", "[[]]", "[[0],[2]]", "[0]", '[["a"]]', "[[0.5]]", "[[true]]", "[[-1]]")


@pytest.mark.parametrize("content", NO_TREES)
def test_files_that_hold_no_tree_are_named(tmp_path, content):
    (tmp_path / "bad").write_text(content)
    with pytest.raises(ConfigError, match="bad holds no tree"):
        read_shapes({"bad": str(tmp_path / "bad")})
    with pytest.raises(ConfigError, match="no tree"):
        read_shapes({"gone": str(tmp_path / "gone")})
    for taken in ("mc_sim_7b_63", "4x2", "2"):
        with pytest.raises(ConfigError, match=taken):
            read_shapes({taken: str(tmp_path / "bad")})


@pytest.mark.parametrize(("text", "error", "hint"), [
    ("", InvalidRequest, "use chain"),
    ("chain", InvalidRequest, "use chain"),
    ("chain()", InvalidRequest, "whole numbers k"),
    ("chain(-1)", InvalidRequest, "whole numbers k"),
    ("chain(1,2)", InvalidRequest, "whole numbers k"),
    ("chain(0)", InvalidRequest, "keep k in 1..256"),
    ("chain(257)", InvalidRequest, "keep k in 1..256"),
    ("chain(4) x", InvalidRequest, "use chain"),
    ("dynamic(4,4)", InvalidRequest, "depth, top_k, nodes"),
    ("dynamic(4,65,8)", InvalidRequest, "keep top_k in 1..64"),
    ("bush(3)", UnknownName, "use chain"),
    ("static(oak)", UnknownName, "mc_sim_7b_63"),
    ("static()", UnknownName, "mc_sim_7b_63"),
    ("static(4,2)", UnknownName, "4x2x1"),
    ("static(4x0)", InvalidRequest, "at least 1 child"),
    ("static(9999x9999)", InvalidRequest, "at most 256 nodes"),
    ("static(0 1 1)", InvalidRequest, "each of at most 256 nodes once"),
    ("static(0 2)", InvalidRequest, "no tree at 2"),
    ("static(0 1.0)", InvalidRequest, "no tree at 1.0"),
    ("static(0 1.0.1)", InvalidRequest, "no tree at 1.0.1"),
    ("static(0 .1)", UnknownName, "4x2x1"),
    ("static(0 1..0)", UnknownName, "4x2x1"),
    ("static(@/etc/passwd)", UnknownName, "4x2x1"),
])
def test_bad_trees_name_the_field_and_the_remedy(text, error, hint):
    with pytest.raises(error, match=r"^tree: ") as caught:
        parse_tree(text)
    assert caught.value.field == "tree" and caught.value.remedy
    assert hint in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(parents_of_any_tree)
def test_depths_and_ancestors_are_those_of_the_walk_up(parents):
    paths = [path_of(parents, node) for node in range(len(parents))]
    assert depths(parents).tolist() == [len(path) for path in paths]
    table = ancestor_lists(parents)
    assert table.shape == (len(parents), max(map(len, paths), default=0))
    for row, path in zip(table.tolist(), paths, strict=True):
        assert row == path + [-1] * (len(row) - len(path))


def test_a_child_before_its_parent_is_refused():
    with pytest.raises(ValueError, match="node 0 stands before its parent 1"):
        depths(np.array([1, -1], np.int32))


def test_rows_of_a_chain_and_of_no_draft():
    rows = tree_rows(draft_of([-1, 0]), base_slot=10, root_position=10)
    assert rows.positions.tolist() == [10, 11, 12]
    assert rows.slots.tolist() == [10, 11, 12]
    assert rows.prefix_len.tolist() == [11, 11, 11]
    assert rows.ancestors.tolist() == [[-1, -1], [11, -1], [11, 12]]
    plain = tree_rows(empty_draft(), base_slot=10, root_position=10)
    assert (plain.slots.tolist(), plain.prefix_len.tolist(), plain.ancestors.shape) == ([10], [11], (1, 0))


@settings(max_examples=60, deadline=None)
@given(parents_of_any_tree, st.integers(0, 9000), st.integers(0, 9000))
def test_a_row_sees_the_prefix_and_its_own_path_only(parents, base, position):
    rows = tree_rows(draft_of(parents), base_slot=base, root_position=position)
    for array in (rows.positions, rows.slots, rows.prefix_len, rows.ancestors):
        assert array.dtype == np.int32 and array.flags["C_CONTIGUOUS"] and len(array) == 1 + len(parents)
    for node in range(len(parents)):
        path = path_of(parents, node)
        seen = [slot for slot in rows.ancestors[1 + node].tolist() if slot >= 0]
        assert seen == [base + 1 + n for n in path]
        assert seen[-1] == rows.slots[1 + node]
        assert rows.positions[1 + node] == position + len(path)


@settings(max_examples=80, deadline=None)
@given(parents_of_any_tree, st.integers(0, 30), st.data())
def test_selection_is_a_tree_of_the_best(parents, count, data):
    own = data.draw(st.lists(st.sampled_from([0.0, -0.5, -1.0, -3.0]), min_size=len(parents), max_size=len(parents)))
    scores = np.array([sum(own[n] for n in path_of(parents, node)) for node in range(len(parents))], np.float32)
    chosen = select_nodes(parents, scores, count)
    kept = chosen.kept.tolist()
    assert len(kept) == min(count, len(parents))
    assert kept == sorted(kept)
    for new, old in enumerate(kept):
        parent = chosen.parents[new]
        assert parent < new
        assert (kept[parent] if parent >= 0 else -1) == parents[old]
    rank = {n: (-scores[n], len(path_of(parents, n)), n) for n in range(len(parents))}
    assert set(kept) == set(sorted(rank, key=rank.__getitem__)[: len(kept)])


def test_selection_stays_closed_when_a_child_scores_above_its_parent():
    chosen = select_nodes(np.array([-1, -1, 0], np.int32), np.array([-5.0, -1.0, -0.1], np.float32), 2)
    assert (chosen.kept.tolist(), chosen.parents.tolist()) == ([0, 1], [-1, -1])
    with pytest.raises(ValueError, match="without a score"):
        select_nodes(np.array([-1], np.int32), np.array([np.nan], np.float32), 1)


def test_prune_keeps_the_likely_part():
    draft = draft_of([-1, -1, 0, 1, 3], [0.3, 0.6, 0.1, 0.5, 0.4])
    small = prune(draft, 3)
    assert small.token_ids.tolist() == [101, 103, 104]
    assert small.parents.tolist() == [-1, 0, 1]
    assert small.survival.tolist() == draft.survival[[1, 3, 4]].tolist()
    assert small.log_q.tolist() == draft.log_q[[1, 3, 4]].tolist()
    assert prune(draft, 5) is draft
    assert prune(draft, 0).num_nodes == 0
