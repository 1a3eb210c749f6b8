"""Which family drafts for a sequence: worth by chances and seconds, evidence that fades, catching up as a cost."""

from __future__ import annotations

import numpy as np
import pytest

from pdspec.engine.families import (
    HEAD,
    NOBODY,
    SUFFIX,
    Evidence,
    Offer,
    accepted_each,
    believed,
    choose,
    credible,
    judged,
    paid_off,
    worth,
)
from pdspec.spec.protocol import Draft


def flat(rows):
    """Any number of rows takes one second."""
    return np.ones(len(rows))


def dear(rows):
    """Each row takes a second."""
    return np.asarray(rows, np.float64)


def offer(family: str, *chances: float, seconds: float = 0.0, **more) -> Offer:
    return Offer(family=family, survival=np.array(chances, np.float32), seconds=seconds, **more)


def one(*offers: Offer, verify_s=flat, tokens: int = 1) -> str:
    return choose([offers], tokens, tokens, verify_s)[0]


def test_an_offer_is_worth_its_best_nodes_less_what_they_cost():
    found = worth(offer(HEAD, 0.25, 0.75, 0.5), 1.0, lambda more: 0.4 * more)
    assert found.nodes == 2 and found.promised == pytest.approx(1.25) and found.tokens == pytest.approx(0.45)
    late = worth(offer(HEAD, 0.25, 0.75, 0.5, seconds=0.5), 1.0, lambda more: 0.4 * more)
    assert late.tokens == pytest.approx(-0.05)
    assert worth(offer(SUFFIX), 1.0, flat).nodes == worth(offer(SUFFIX, 0.0), 1.0, flat).nodes == 0


@pytest.mark.parametrize(
    ("offers", "choice"),
    [
        ([offer(SUFFIX, 0.9, 0.8, 0.7), offer(HEAD, 0.6, 0.3, seconds=0.1)], SUFFIX),
        ([offer(SUFFIX), offer(HEAD, 0.6, 0.3, seconds=0.1)], HEAD),  # nothing matches
        ([offer(SUFFIX, 0.1), offer(HEAD, 0.6, 0.3, seconds=0.1)], HEAD),
        ([offer(SUFFIX, 0.5), offer(HEAD, 0.6, 0.3, seconds=0.5)], SUFFIX),  # the head takes too long
        ([offer(SUFFIX), offer(HEAD, 0.6, 0.3, seconds=1.5)], NOBODY),
        ([offer(SUFFIX), offer(HEAD, 0.2, seconds=0.3), offer(HEAD, 0.2, 0.1, seconds=0.05)], HEAD),  # a better depth
        ([offer(SUFFIX, 0.1, curiosity=0.6), offer(HEAD, 0.6)], SUFFIX),
        ([], NOBODY),
    ],
)
def test_the_choice(offers, choice):
    assert one(*offers) == choice


def test_where_a_row_costs_what_its_token_is_worth_nobody_drafts():
    assert one(offer(SUFFIX, 0.9, 0.9), offer(HEAD, 0.95), verify_s=dear) == NOBODY


def test_what_others_promise_raises_what_a_second_is_worth():
    """One slow head is worth its time beside plain steps, and not beside sequences that put out five tokens each."""
    slow, rich = offer(HEAD, 0.5, seconds=0.3), offer(SUFFIX, 1.0, 1.0, 1.0, 1.0)
    assert choose([[slow]], 1, 1, flat) == [HEAD]
    assert choose([[rich], [slow]], 2, 2, flat) == [SUFFIX, NOBODY]


def test_catching_up_is_paid_over_what_is_left_of_the_answer():
    assert paid_off(1.6, 1000) == pytest.approx(0.1)
    assert paid_off(1.6, 2) == pytest.approx(1.6)
    late = offer(HEAD, 0.6, seconds=paid_off(1.6, 1000)), offer(HEAD, 0.6, seconds=paid_off(1.6, 4))
    assert [one(offer(SUFFIX, 0.3), head) for head in late] == [HEAD, SUFFIX]


def chain(tokens: list[int], survival: list[float]) -> Draft:
    """A draft that is a chain."""
    count = len(tokens)
    return Draft(token_ids=np.array(tokens, np.int32), parents=np.arange(-1, count - 1, dtype=np.int32),
                 log_q=np.zeros(count, np.float32), survival=np.array(survival, np.float32))  # fmt: skip


def test_a_draft_is_judged_level_by_level_whether_it_was_verified_or_not():
    draft = chain([5, 6, 7], [0.5, 0.25, 0.2])
    assert judged(draft, [9]) == (0.5, 0)
    assert judged(draft, [5, 9]) == (1.0, 1)
    assert judged(draft, [5, 6, 7, 8]) == pytest.approx((1.8, 3))
    assert judged(draft.part(np.empty(0, np.int64)), [5]) == (0.0, 0)


def test_chances_that_are_believed_grow_by_level_and_fall_down_a_path():
    evidence = Evidence(promised=2.0, accepted=6.0)
    np.testing.assert_allclose(believed(chain([5, 6, 7], [0.4, 0.1, 0.01]), evidence).survival, [0.8, 0.4, 0.08])
    np.testing.assert_allclose(believed(chain([5, 6], [0.3, 0.25]), evidence).survival, [0.6, 0.6])
    known = np.array([[0.4, 0.2], [0.1, 0.0]], np.float32)
    np.testing.assert_allclose(credible(known, np.array([[1], [2]]), evidence), [[0.8, 0.4], [0.4, 0.0]])


def test_evidence_decides_and_fades():
    kept, broken = Evidence(), Evidence()
    assert kept.credibility == 1.0 and Evidence(prior=0.25).credibility == 0.25
    for _ in range(50):
        kept.fade()
        broken.fade()
        kept.add(2.0, 2)
        broken.add(2.0, 0)
    assert kept.credibility == pytest.approx(1.0) and broken.credibility < 0.15
    chances = believed(chain([1, 2], [0.8, 0.5]), broken).survival
    assert one(Offer(family=SUFFIX, survival=chances, seconds=0.0), offer(HEAD, 0.3)) == HEAD
    low = broken.curiosity(50)
    assert broken.told == 0.0
    for _ in range(300):
        broken.fade()
    assert broken.credibility < 0.15 and broken.curiosity(350) > 3 * low, "what was long not tried is tried again"
    for _ in range(20):
        broken.add(1.0, 1)
    broken.add(0.0, 0)
    assert broken.credibility > 0.25, "and believed when it is right"


def test_what_drawn_drafts_had_accepted_stands_for_chances():
    np.testing.assert_allclose(accepted_each(2.5), [1.0, 1.0, 0.5])
    assert len(accepted_each(0.0)) == 0
    evidence = Evidence()
    for accepted in (2, 2, 0):
        evidence.add(1.0, accepted)
    assert evidence.told == pytest.approx(1.9)
