"""What `pdspec check plan` and the calibration compute from what they have seen."""

from __future__ import annotations

import pytest

from pdspec.errors import ConfigError
from pdspec.study.plan import check
from pdspec.study.simulator.calibrate import Seen, differences
from pdspec.types import GenerationStats


def stats(verifications: int, tokens: int, reached=(), accepted=()) -> GenerationStats:
    return GenerationStats(
        verifications=verifications, output_tokens=1 + tokens, reached_per_position=reached,
        accepted_per_position=accepted,
    )  # fmt: skip


def test_a_prediction_on_its_own_prompts_is_what_was_measured():
    own = {
        "none": [(1.0, stats(100, 100))],
        "chain": [(0.9, stats(50, 95, reached=(50, 30), accepted=(30, 15)))],  # 50 + 30 + 15 tokens
    }
    measured = (95 / 0.9) / (100 / 1.0)
    assert check._speedup(own, "chain") == pytest.approx(measured)
    assert check._predicted(own, "chain") == pytest.approx(measured)


def test_steps_without_a_draft_count_as_one_token():
    own = {"none": [(1.0, stats(100, 100))], "ngram": [(1.0, stats(80, 90, reached=(20,), accepted=(10,)))]}
    assert check._predicted(own, "ngram") == pytest.approx(90 / 100)


def test_an_answer_seen_by_its_chunks():
    seen = Seen(chunks=((0.1, 1), (0.2, 2), (0.23, 1), (0.27, 3)), asked_at=0.0, stats=GenerationStats())
    assert seen.gaps == [pytest.approx(0.03), pytest.approx(0.04)]
    assert seen.chances == (pytest.approx(1 / 3),) * 3


def test_differences_are_shares_of_what_was_measured():
    one = {"tokens_per_second": 110.0, "total_ms": {"p50": 90.0, "p99": 200.0}}
    other = {"tokens_per_second": 100.0, "total_ms": {"p50": 100.0, "p99": 200.0}}
    assert differences(one, other) == {
        "throughput": pytest.approx(0.1), "p50": pytest.approx(-0.1), "p99": pytest.approx(0.0),
    }  # fmt: skip


def test_an_unknown_part_is_refused_and_the_textbook_holds():
    given = {"worker": {}, "drafters": (), "prompts": None, "num_prompts": 2, "max_tokens": 2, "requests": 4,
             "load": 0.5, "progress": print}  # fmt: skip
    with pytest.raises(ConfigError, match="textbook"):
        check.run(parts=["textbooks"], **given)
    assert check.run(parts=["textbook"], **given)["ok"]
