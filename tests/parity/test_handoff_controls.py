"""The positive controls of ``pdspec check handoff``: a head that knows a text is accepted behind the handoff, every way
of breaking the handoff is seen, and the controls fail where they must."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError
from pdspec.study import handoff_check
from pdspec.study.breakages import APPLY, BREAKAGES, DRAFTER, broken
from pdspec.study.full_acceptance import KNOWS, full_acceptance
from pdspec.study.handoff_controls import BROKEN, DEPTH, HEALTHY, Accepted, controls, count, cut, judge
from pdspec.study.memorised import Memorised, memorise
from pdspec.study.pair import Pair
from tests.parity.roles import TINY

CONFIG = WorkerConfig(
    **{**TINY, "dtype": "float32", "heads": {}, "poison": False, "chunk": 2048, "drafters": ("none", DRAFTER)}
)
CUTS = 12
TINY_WORKER = {"model": "tiny", "threads": 1}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Memorised, Path]:
    folder = tmp_path_factory.mktemp("memorised")
    return memorise(CONFIG, folder, depth=DEPTH), folder


@pytest.fixture(scope="module")
def pair(known: tuple[Memorised, Path]) -> Iterator[Pair]:
    with Pair(CONFIG.replace(heads={DRAFTER: str(known[1])})) as pair:
        yield pair
        for worker in (pair.prefill, pair.decode):
            pair.on_engine(worker, worker.engine.host.check_integrity)


def measure(pair: Pair, text: Memorised) -> Accepted:
    requests = cut(text, CUTS)
    return count(pair.ask(requests), text, requests)


def test_a_head_that_knows_the_text_is_accepted_at_each_position(pair, known):
    found = measure(pair, known[0])
    assert found.same_text and found.chains == CUTS
    assert all(share >= HEALTHY for share in found.per_position)


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_handoff_is_not_accepted_and_leaves_no_trace(pair, known, name):
    resources = pair.prefill.engine.host.resources
    drafter, cache, model = resources.drafters[DRAFTER], resources.cache, resources.drafters[DRAFTER].model
    with broken(pair, name):
        pair.ask(cut(known[0], CUTS)[-1:])
        found = measure(pair, known[0])
    assert found.acceptance < BROKEN
    assert found.same_text  # tokens are right whatever the draft: only acceptance tells
    assert resources.drafters[DRAFTER] is drafter and resources.cache is cache and drafter.model is model


def test_a_head_that_knows_nothing_fails_the_controls():
    result = controls(CONFIG, lambda text: None, cuts=4, steps=1)
    assert not result["ok"] and not result["missed"] and result["same_text"]
    assert min(result["healthy"]["per_position"]) < HEALTHY


def test_the_verdict_fails_for_each_thing_that_must_not_be():
    whole = Accepted(acceptance=1.0, per_position=(1.0,) * DEPTH, chains=20, same_text=True)
    low = Accepted(acceptance=0.3, per_position=(0.3,) * DEPTH, chains=20, same_text=True)
    found = dict.fromkeys(BREAKAGES, low)
    assert judge(whole, found)["ok"]
    assert not judge(replace(whole, per_position=(1.0, 1.0, 1.0, 0.94)), found)["ok"]
    assert not judge(replace(whole, same_text=False), found)["ok"]
    for name in BREAKAGES:
        seen = judge(whole, {**found, name: replace(low, acceptance=BROKEN)})
        assert not seen["ok"] and seen["missed"] == [name]
        assert judge(whole, {other: low for other in BREAKAGES if other != name})["missed"] == [name]
        assert judge(whole, {**found, name: replace(low, acceptance=float(np.nan))})["missed"] == [name]


def test_a_breakage_that_breaks_nothing_would_be_missed(pair, known, monkeypatch):
    monkeypatch.setitem(BREAKAGES, "position +1", lambda resources, name: lambda: None)
    with broken(pair, "position +1"):
        same = measure(pair, known[0])
    assert same.acceptance >= BROKEN


def test_parts_are_chosen_by_name():
    asked = handoff_check.Asked(prompts=None, num_prompts=1, max_tokens=4)
    with pytest.raises(ConfigError, match="unknown part 'control'"):
        handoff_check.run(worker={}, asked=asked, progress=print, parts=["control"])
    with pytest.raises(ConfigError, match="is about bfloat16"):
        handoff_check.run(worker={"dtype": "float32"}, asked=asked, progress=print, parts=["acceptance"])


def test_parts_that_say_nothing_about_a_family_are_refused_where_named():
    asked = handoff_check.Asked(prompts=None, num_prompts=1, max_tokens=4)
    for part in ("draft_state", "controls"):
        with pytest.raises(ConfigError, match=f"part {part} says nothing about ngram"):
            handoff_check.run(worker=TINY_WORKER, asked=asked, progress=print, parts=[part], drafters=["ngram"])


@pytest.mark.parametrize("drafter", KNOWS)
def test_who_has_the_target_s_scores_is_accepted_whole_greedy_and_sampled(drafter):
    result = full_acceptance(CONFIG, drafter, lambda text: None)
    assert result["ok"] and result["acceptance"] == {"0": 1.0, "1": 1.0} and result["answers"] == 16


def test_heads_of_medusa_are_accepted_and_their_breakages_seen():
    result = controls(CONFIG, lambda text: None, "medusa", cuts=CUTS)
    assert result["ok"] and set(result["breakages"]) == set(APPLY["medusa"])


def test_acceptance_asks_again_until_there_are_tokens_enough():
    worker = {**TINY, "poison": False}
    asked = handoff_check.Asked(prompts=None, num_prompts=2, max_tokens=30, tokens=300)
    result = handoff_check.run(worker=worker, asked=asked, progress=lambda text: None, parts=["acceptance"])
    found = result["acceptance"]
    assert found["tokens"] >= found["tokens_wanted"] == 300 and found["requests"] > 4 and found["requests"] % 4 == 0
    assert found["same_tokens"] and result["ok"] == found["ok"]
