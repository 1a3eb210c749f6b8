"""Calibrated survival: what it begins with, what it learns, and what it may not touch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.spec.draws import Drawing
from pdspec.spec.growth import Growth, Ranked, rank_children
from pdspec.spec.protocol import Draft
from pdspec.spec.survival import FEATURES, Calibration, Forecast, Kind, SurvivalModel, _of_draft, features_of
from pdspec.spec.tree import parse_tree
from pdspec.types import GenerateRequest, SamplingParams

GREEDY = Kind.of(SamplingParams())
SAMPLED = Kind.of(SamplingParams(temperature=1.0))


def scored(random: np.random.Generator, nodes: int, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """log score and log q of the best children of some nodes."""
    log_q = torch.from_numpy(random.standard_normal((nodes, 64)).astype(np.float32) * 2).log_softmax(-1)
    noise = torch.from_numpy(random.gumbel(size=64).astype(np.float32))
    best = rank_children(log_q, 1.0, noise, np.arange(64), width)
    return best.score, best.log_q


def log_loss(chance: np.ndarray, said: np.ndarray) -> float:
    return float(-np.where(said, np.log(chance), np.log1p(-chance)).mean())


def test_the_prior_is_the_score_but_where_noise_is_shared():
    score, log_q = scored(np.random.default_rng(0), 5)
    kinds = {"greedy": GREEDY, "ratio": Kind.of(SamplingParams(temperature=0.7, verify="rejection"))}
    for kind in kinds.values():
        found = Calibration.prior(kind, has_q=True).log_chance(features_of(score, log_q, 2))
        np.testing.assert_allclose(found, score, atol=1e-4)
    none = Calibration.prior(SAMPLED, has_q=False).log_chance(features_of(score, log_q, 1))
    np.testing.assert_allclose(none, score, atol=1e-4)
    coupled = Calibration.prior(SAMPLED, has_q=True)
    best = features_of(score, log_q, 1)[:, 0]
    assert (coupled.log_chance(best) < score[:, 0])[score[:, 0] > np.log(0.5)].all()  # less sure than the score


def test_a_row_has_the_same_chance_beside_any_others():
    features = features_of(*scored(np.random.default_rng(1), 33), depth=3)
    calibration = Calibration.prior(SAMPLED, has_q=True)
    every = calibration.log_chance(features)
    assert (every <= 0).all()
    for rows in ([0], [7, 8], list(range(5, 22))):
        assert np.array_equal(calibration.log_chance(features[rows]), every[rows])


@pytest.mark.parametrize("true", [(-0.7, 0.5, 0.3, 0.0, -0.4, 0.1), (0.4, 1.3, -0.2, -0.1, 0.0, -0.3)])
def test_calibration_converges_to_the_chances_that_hold(true):
    random = np.random.default_rng(2)
    holds = Calibration(weights=np.array(true), evidence=np.zeros((len(FEATURES),) * 2))
    model = SurvivalModel("online")
    sure = model.calibration(SAMPLED)
    for _ in range(1500):
        features = features_of(*scored(random, 1), depth=int(random.integers(1, 5)))[0]
        said = random.random(len(features)) < np.exp(holds.log_chance(features))
        sure = sure.updated(features, said)
    features = np.concatenate([features_of(*scored(random, 500), depth=depth).reshape(-1, len(FEATURES))
                               for depth in (1, 2, 3)])
    chance, learned = np.exp(holds.log_chance(features)), np.exp(sure.log_chance(features))
    said = random.random(len(chance)) < chance
    prior = np.exp(Calibration.prior(SAMPLED, has_q=True).log_chance(features))
    assert log_loss(learned, said) < log_loss(chance, said) + 0.01 < log_loss(prior, said)
    for low in (0.0, 0.1, 0.3, 0.6):  # in each band as many are accepted as it says
        band = (learned >= low) & (learned < low + 0.3)
        assert abs(learned[band].mean() - chance[band].mean()) < 0.05


def test_an_estimate_that_was_far_too_sure_does_not_leap():
    features = np.repeat(features_of(np.full((1, 1), -1e-6, np.float32), np.zeros((1, 1), np.float32), 1)[0], 9, 0)
    one = Calibration.prior(GREEDY, has_q=True).updated(features, np.zeros(9, bool))
    assert np.abs(one.weights - Calibration.prior(GREEDY, has_q=True).weights).max() <= 0.5


def test_every_child_of_a_reached_node_is_judged_and_no_other():
    forecast = Forecast(
        kind=GREEDY, root=9, token_ids=np.array([5, 6, 7, 8, 9, 7], np.int32),
        parents=np.array([-1, -1, 0, 0, 1, 3], np.int32), features=np.zeros((6, len(FEATURES)), np.float32),
    )
    for said, nodes, right in (
        ((5, 8, 1), [0, 1, 2, 3, 5], [0, 3]), ((6, 1), [0, 1, 4], [1]), ((1,), [0, 1], []), ((5,), [0, 1], [0]),
    ):
        judged, accepted = forecast.judged(said)
        assert (judged.tolist(), judged[accepted].tolist()) == (nodes, right)


def grown(calibration: Calibration | None, *, drawn: bool) -> Draft:
    random = np.random.default_rng(3)
    ids = np.arange(64)

    def children(nodes: int) -> Ranked:
        logits = torch.from_numpy(random.standard_normal((nodes, 64)).astype(np.float32))
        chooser = Fixed()
        noise = Drawing(chooser, 0) if drawn else torch.from_numpy(random.gumbel(size=64).astype(np.float32))
        return rank_children(logits, 1.0, noise, ids, 4, drawn=drawn)

    growth = Growth(parse_tree("static(4x2x1)" if drawn else "dynamic(4,4,9)"), 9, children(1), 9,
                    calibration=calibration)
    while frontier := growth.frontier():
        growth.add(frontier, children(len(frontier)))
    return growth.draft()


class Fixed:
    """Draws the first ids."""

    def order(self, position, ids, log_q, count):
        return np.arange(count)


def test_survival_falls_down_every_path_whatever_was_learned():
    random = np.random.default_rng(4)
    for _ in range(20):
        weights = random.standard_normal(len(FEATURES)) * 2
        draft = grown(Calibration(weights=weights, evidence=np.zeros((6, 6))), drawn=False)
        above = np.where(draft.parents < 0, 1.0, draft.survival[draft.parents])
        assert draft.num_nodes == 9 and (draft.survival <= above).all() and (draft.survival >= 0).all()


def test_what_is_drawn_is_the_same_tree_under_any_calibration():
    plain = grown(None, drawn=True)
    other = grown(Calibration(weights=np.array([1.0, -2, 3, 1, 4, 1]), evidence=np.zeros((6, 6))), drawn=True)
    for name in ("token_ids", "parents", "survival"):
        assert np.array_equal(getattr(plain, name), getattr(other, name))


def test_a_draft_without_q_keeps_its_survival_until_something_is_learned():
    draft = Draft(token_ids=np.arange(4, dtype=np.int32), parents=np.array([-1, 0, 0, 2], np.int32),
                  log_q=np.full(4, np.nan, np.float32), survival=np.array([0.9, 0.6, 0.2, 0.1], np.float32))
    features = _of_draft(draft, matched=7)
    chances = np.exp(Calibration.prior(SAMPLED, has_q=False).log_chance(features))
    np.testing.assert_allclose(chances, [0.9, 0.6 / 0.9, 0.2 / 0.9, 0.5], rtol=1e-4)
    assert features[:, 4].tolist() == pytest.approx([0, 0, np.log(2), 0]) and features[:, 5].tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_worker_learns_only_where_it_is_told_to_and_answers_stay_the_same(temperature):
    answers, chances = {}, {}
    for mode in ("q", "fixed", "online"):
        generator = LocalGenerator(WorkerConfig(
            model="tiny", drafters=("none", "draft_model", "suffix"), drafter="draft_model", survival=mode,
            heads={"draft_model": "tiny"}, cache_tokens=2048, threads=1, dtype="float32",
        ))
        kind = Kind.of(SamplingParams(temperature=temperature))
        try:
            for name, tree in (("none", ""), ("suffix", ""), ("draft_model", "dynamic(3,3,6)")):
                params = SamplingParams(max_tokens=32, ignore_eos=True, seed=3, temperature=temperature)
                request = GenerateRequest(request_id="a", prompt_ids=tuple(range(20)), sampling=params, drafter=name,
                                          tree=tree)
                chunks = list(generator.generate(request))
                answers[mode, name] = [token for chunk in chunks for token in chunk.token_ids]
            found = generator.resources.drafters["draft_model"].survival.calibration(kind)
            if found is not None:
                best = features_of(np.log(np.array([[0.3]], np.float32)), np.log(np.array([[0.3]], np.float32)), 1)
                chances[mode] = float(np.exp(found.log_chance(best))[0, 0])
        finally:
            generator.resources.close()
    assert len({tuple(answer) for answer in answers.values()}) == 1
    assert chances["online"] > chances["fixed"] + 0.1  # the draft model is the target: its best is always right
