"""The parts of the benchmarks that can be wrong without anyone noticing."""

from __future__ import annotations

from pdspec.spec.tree import parse_tree
from pdspec.study.bench_decode import settings_of
from pdspec.study.repetition import repeated_share


def test_repeated_share_counts_tokens_inside_ngrams_seen_before_in_the_same_answer():
    once = list(range(20))
    assert repeated_share([once]) == 0.0
    assert repeated_share([once + once]) == 0.5
    assert repeated_share([once, once]) == 0.0  # other answers do not count
    assert repeated_share([[7] * 16]) == 15 / 16  # the second of the overlapping 8-grams already repeats the first
    assert repeated_share([]) == 0.0


def test_every_setting_that_is_tried_stays_within_the_node_budget():
    for name in ("none", "ngram", "eagle3"):
        for budget in (2, 5, 8):
            settings = settings_of(name, budget)
            assert settings and len(set(settings)) == len(settings)
            assert all(parse_tree(s.tree).max_nodes <= budget for s in settings if s.tree)
