"""Survival: the chance that the target says what a draft foresaw, calibrated by what it said before.

A node's chance is P(accepted | its parent was); the product down its path is its survival. Given the noise that target
and drafter share, a child's chance is not q, nor is it the share that the drafter's own softmax(log q + g) gives it:
where the two models differ, that is far too sure. So it is a logistic regression on

    one     1
    odds    logit of the score: softmax(log q + g) where children are coupled, else q (or what a family has in place)
    known   log q; log(1 + matched tokens) of a family without q
    gap     from the best sibling's log score
    rank    log(1 + rank among the siblings)
    depth   below the root, from 0

fitted online, one Newton step for all verdicts of a step, for each family and *kind* of request (temperature, coupled
or not). At temperature 0 odds is the logit of q: calibrated q. Every child of a node that the target reached has been
judged, whether its row was in the forward or not: the target's token is known there. So what is left out of a tree is
learned from as well, and choosing by survival does not bias what is learned.

    setting  q       a node's chance is its score
             fixed   the prior: drafts are a function of the request alone
             online  the prior, then what this worker's verifications say
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pdspec.spec.protocol import Draft, DraftContext, HiddenRows, Verdict
from pdspec.types import SamplingParams, Verify

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

FEATURES = ("one", "odds", "known", "gap", "rank", "depth")
_DEEPEST, _WIDEST_ODDS, _LEAST_LOG_Q, _WIDEST_GAP = 5, 12.0, -12.0, 8.0
_PRIOR_PRECISION = (4.0, 16.0, 16.0, 16.0, 8.0, 8.0)  # so many observations of curvature 1 weigh as much
_LEAST_CURVATURE, _LARGEST_STEP = 0.05, 0.5  # of one Newton step: an estimate that was far too sure must not leap
_MEMORY = 0.9995  # what a verification leaves of the evidence before it


@dataclass(frozen=True)
class Kind:
    """What is calibrated together: requests of like temperature (in quarters, 0: greedy), whose children are ranked
    with the target's noise or without."""

    quarters: int
    coupled: bool

    @classmethod
    def of(cls, params: SamplingParams) -> Kind:
        """Of a request."""
        if params.temperature == 0.0:
            return cls(quarters=0, coupled=False)
        quarters = max(1, round(4 * min(params.temperature, 2.0)))
        return cls(quarters=quarters, coupled=params.verify == Verify.COUPLED)


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A normal belief over the weights [F] of the regression, F features: ``weights`` is its mean, ``evidence`` [F, F]
    the precision that verifications have added to the prior's."""

    weights: npt.NDArray[np.float64]
    evidence: npt.NDArray[np.float64]

    @classmethod
    def prior(cls, kind: Kind, *, has_q: bool) -> Calibration:
        """Before any verification: a node's chance is its score, but where q is coupled. There it is what
        SmolLM2-135M's shipped EAGLE-3 head had at temperatures 0.6 and 1 (3,700 nodes of 12 prompts each; log loss
        0.42 and 0.32 of the score, 0.32 and 0.30 of this): the lower the temperature, which stretches the odds, the
        less they count."""
        weights = np.zeros(len(FEATURES))
        weights[1] = 1.0
        if kind.coupled and has_q:
            temperature = min(max(kind.quarters / 4, 0.5), 1.0)
            weights[:3] = 0.1 - 2.3 * (1.0 - temperature), 0.6 - 0.8 * (1.0 - temperature), 0.28
        return cls(weights=weights, evidence=np.zeros((len(FEATURES), len(FEATURES))))

    def log_chance(self, features: Floats) -> Floats:
        """log P(accepted | parent accepted) [...] of ``features`` [..., F]. Never above 0; each entry's bits are its
        own."""
        odds = (features * self.weights.astype(np.float32)).sum(-1, dtype=np.float32)
        return -np.logaddexp(np.float32(0), -odds)

    def updated(self, features: Floats, accepted: npt.NDArray[np.bool_], verdicts: int = 1) -> Calibration:
        """After ``verdicts`` that judged nodes of ``features`` [n, F]: one Newton step of the log likelihood."""
        x = features.astype(np.float64)
        chance = np.exp(self.log_chance(features).astype(np.float64))
        curvature = np.maximum(chance * (1.0 - chance), _LEAST_CURVATURE)
        evidence = _MEMORY**verdicts * self.evidence + (x * curvature[:, None]).T @ x
        step = np.linalg.solve(np.diag(_PRIOR_PRECISION) + evidence, x.T @ (accepted - chance))
        step *= min(1.0, _LARGEST_STEP / max(float(np.abs(step).max()), 1e-9))
        return Calibration(weights=self.weights + step, evidence=evidence)


def features_of(score: Floats, known: Floats, depth: int) -> Floats:
    """[K, W, F] of W siblings below each of K nodes, best first, at ``depth`` (1 below the root); log ``score`` and
    ``known`` are [K, W]."""
    return _stacked(score, known, score[:, :1] - score, np.arange(score.shape[1]), depth)


def _stacked(score: Floats, known: Any, gap: Any, rank: Any, depth: Any) -> Floats:
    sure = np.minimum(score, np.float32(-1e-6))
    found = np.empty((*score.shape, len(FEATURES)), np.float32)
    found[..., 0] = 1.0
    odds = sure - np.log(-np.expm1(sure))
    found[..., 1] = np.minimum(np.maximum(odds, np.float32(-_WIDEST_ODDS)), np.float32(_WIDEST_ODDS))  # clip is slow
    found[..., 2] = np.maximum(known, np.float32(_LEAST_LOG_Q))
    found[..., 3] = np.minimum(gap, np.float32(_WIDEST_GAP))
    found[..., 4] = np.log1p(np.asarray(rank, np.float32))
    found[..., 5] = np.minimum(depth, _DEEPEST + 1) - 1
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """All nodes of a tree as it was made, before anything was left out, until the target has spoken: [N] each,
    ``features`` [N, F]; ``root`` is the root's position."""

    kind: Kind
    root: int
    token_ids: Ints
    parents: Ints
    features: Floats

    def judged(self, output_ids: Sequence[int]) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """The children of the nodes that the target reached, and which of them it said."""
        found: list[Ints] = []
        node = -1
        for token in output_ids:
            children = np.flatnonzero(self.parents == node).astype(np.int32)
            found.append(children)
            said = children[self.token_ids[children] == token]
            if not len(said):
                break
            node = int(said[0])
        lengths = [len(children) for children in found]
        nodes = np.concatenate(found) if found else np.empty(0, np.int32)
        return nodes, self.token_ids[nodes] == np.repeat(np.array(output_ids[: len(found)], np.int64), lengths)


class SurvivalModel:
    """One family's calibrations by kind. ``mode`` as above; ``has_q`` says what its prior is."""

    def __init__(self, mode: str = "q", *, has_q: bool = True) -> None:
        self.mode, self.has_q = mode, has_q
        self._fitted: dict[Kind, Calibration] = {}

    def calibration(self, kind: Kind) -> Calibration | None:
        """That of a kind of request; None: a node's chance is its score."""
        if self.mode == "q":
            return None
        return self._fitted.get(kind) or Calibration.prior(kind, has_q=self.has_q)

    def learn(self, said: Sequence[tuple[Forecast, Sequence[int]]]) -> None:
        """What the target said after the roots of trees, all of one step."""
        if self.mode != "online":
            return
        for kind in {forecast.kind for forecast, _ in said}:
            ours = [(forecast, *forecast.judged(ids)) for forecast, ids in said if forecast.kind == kind]
            features = np.concatenate([forecast.features[nodes] for forecast, nodes, _ in ours])
            known = self.calibration(kind)
            if len(features) and known is not None:
                accepted = np.concatenate([judged for *_, judged in ours])
                self._fitted[kind] = known.updated(features, accepted, len(ours))


class Calibrated:
    """Part of a drafter whose ``ctx.state`` has a ``forecast: Forecast | None``."""

    has_q = True

    def __init__(self) -> None:
        self.survival = SurvivalModel(has_q=self.has_q)

    def use_survival(self, mode: str) -> None:
        """Begin anew in this mode."""
        self.survival = SurvivalModel(mode, has_q=self.has_q)

    def _calibrate(self, ctx: DraftContext, draft: Draft, matched: int) -> Draft:
        """A draft without q of ``matched`` tokens: what its family takes for survival, calibrated."""
        state: Any = ctx.state
        kind = Kind.of(ctx.sampling)
        calibration, state.forecast = self.survival.calibration(kind), None
        if calibration is None or draft.num_nodes == 0:
            return draft
        features = _of_draft(draft, matched)
        state.forecast = Forecast(kind=kind, root=ctx.root_position, token_ids=draft.token_ids, parents=draft.parents,
                                  features=features)
        survival = np.exp(calibration.log_chance(features))
        for node, parent in enumerate(draft.parents.tolist()):
            if parent >= 0:
                survival[node] *= survival[parent]
        return replace(draft, survival=survival)

    def _learn(self, batch: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """Of each sequence that has a forecast for the root that was verified."""
        said = []
        for ctx, verdict, _ in batch:
            state: Any = ctx.state
            forecast, state.forecast = state.forecast, None
            if forecast is not None and forecast.root == ctx.root_position - len(verdict.output_ids):
                said.append((forecast, verdict.output_ids))
        self.survival.learn(said)


def _of_draft(draft: Draft, matched: int) -> Floats:
    """[N, F] of a draft without q, a node's score being its part in its parent's survival."""
    above = np.where(draft.parents < 0, np.float32(1), draft.survival[draft.parents])
    score = np.log(np.clip(draft.survival / np.maximum(above, np.float32(1e-9)), np.float32(1e-6), np.float32(1)))
    depth, rank, gap = np.ones(draft.num_nodes), np.zeros(draft.num_nodes), np.zeros(draft.num_nodes, np.float32)
    best: dict[int, np.float32] = {}
    seen: dict[int, int] = {}
    for node, parent in enumerate(draft.parents.tolist()):
        depth[node] = 1 if parent < 0 else depth[parent] + 1
        rank[node] = seen[parent] = seen.get(parent, -1) + 1
        gap[node] = max(np.float32(0), best.setdefault(parent, score[node]) - score[node])
    return _stacked(score, np.log1p(np.float32(matched)), gap, rank, depth)
