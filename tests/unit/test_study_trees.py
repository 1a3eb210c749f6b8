"""What ``pdspec study trees`` compares, and how it judges it."""

from __future__ import annotations

from pdspec.spec.tree import parse_tree
from pdspec.study.comparisons import NODES, tree_orders, trees


def test_trees_of_a_comparison_have_equal_nodes():
    cells = trees(["eagle3", "suffix"], 1.0)
    for cell in cells:
        assert cell.label.endswith(f", {parse_tree(cell.way.tree).max_nodes} nodes")
    labels = [cell.label for cell in cells if cell.way.drafter == "eagle3"]
    assert labels == [f"{kind}, {nodes} nodes" for nodes in NODES
                      for kind in ("chain", "static", "dynamic", "dynamic by online", "dynamic by q")]


def test_orders_say_what_holds():
    def rows(**lengths: float) -> list[dict]:
        return [{"setting": f"{kind.replace('_', ' ')}, 4 nodes", "drafter": "eagle3", "temperature": 1.0,
                 "acceptance_length": length} for kind, length in lengths.items()]

    (order,) = tree_orders(rows(chain=1.4, static=1.5, dynamic=1.6, dynamic_by_online=1.6, dynamic_by_q=1.5))
    assert order["dynamic_static_chain"] and order["survival_over_q"]
    (order,) = tree_orders(rows(chain=1.6, static=1.5, dynamic=1.7, dynamic_by_online=1.4, dynamic_by_q=1.5))
    assert not order["dynamic_static_chain"] and not order["survival_over_q"]
