"""The target's choice of a token: processors, then ``argmax(log p + g)`` with the noise of the position.

Processors, always in this order, on float32 logits of one row with that row's own history:

1. repetition penalty (prompt and output ids), frequency and presence penalties (output ids)
2. logit bias
3. allowed ids, the grammar's, banned ids, and the ids that would end the answer before ``min_tokens``
4. temperature
5. top-k, then top-p of what is left, then min-p; exactly k with top-k, ties to the lowest id

At temperature 0 the choice is the argmax after step 3 and g = 0. The same functions serve plain decoding, verification
and audits, so that given the logits the token is a function of (params, history, seed, sample, position) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from pdspec.errors import InvalidRequest, PdspecError
from pdspec.grammar import Grammar
from pdspec.noise import LARGEST, gumbel, gumbel_noise
from pdspec.types import SamplingParams, TokenLogprob

__all__ = [
    "History",
    "Support",
    "choose",
    "draft_scores",
    "gumbel_noise",
    "pick",
    "stopping_ids",
    "support",
    "token_logprob",
]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_TOP_P_FLOORS = (-6.0, -12.0)  # below the largest score
_TAIL = 32


def _no_ids() -> Ids:
    return np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """The tokens before a position, as penalties and ``min_tokens`` see them. A value: ``extended`` shares the rest."""

    prompt_ids: Ids  # distinct, ascending
    num_output: int = 0
    seen_ids: Ids = field(default_factory=_no_ids)  # distinct output ids, ascending, but for the tail
    seen_counts: Ids = field(default_factory=_no_ids)
    tail: tuple[int, ...] = ()  # the latest output ids, not yet counted
    grammar: Grammar | None = None  # of structured output, after the output so far

    @classmethod
    def of(
        cls, prompt_ids: Sequence[int], output_ids: Sequence[int] = (), *, grammar: Grammar | None = None
    ) -> History:
        """The history after a prompt and the output so far (target ids). ``grammar`` stands before the output."""
        return cls(prompt_ids=np.unique(np.asarray(prompt_ids, np.int64)), grammar=grammar).extended(output_ids)

    def extended(self, tokens: Sequence[int]) -> History:
        """The history with ``tokens`` put out as well; cheap enough for every tree node."""
        grown = History(
            prompt_ids=self.prompt_ids,
            num_output=self.num_output + len(tokens),
            seen_ids=self.seen_ids,
            seen_counts=self.seen_counts,
            tail=self.tail + tuple(tokens),
            grammar=self.grammar and self.grammar.extended(tokens),
        )
        if len(grown.tail) <= _TAIL:
            return grown
        ids, counts = grown.output_counts()
        return replace(grown, seen_ids=ids, seen_counts=counts, tail=())

    def output_counts(self) -> tuple[Ids, Ids]:
        """Distinct output ids, ascending, and how often each was put out."""
        if not self.tail:
            return self.seen_ids, self.seen_counts
        every = np.concatenate([self.seen_ids, np.asarray(self.tail, np.int64)])
        times = np.concatenate([self.seen_counts, np.ones(len(self.tail), np.int64)])
        ids, where = np.unique(every, return_inverse=True)
        counts = np.zeros(len(ids), np.int64)
        np.add.at(counts, where, times)
        return ids, counts


@dataclass(frozen=True, kw_only=True, eq=False)
class Support:
    """What the target may choose from at one position: float32 ``scores``, equal to log p up to a constant (logits
    after penalties at temperature 0), at ``token_ids``, ascending (None: every id). Excluded ids are -inf or absent."""

    token_ids: Ids | None  # [K]
    scores: Floats  # [K]

    @property
    def log_p(self) -> Floats:
        """Normalised log probabilities [K]."""
        largest = self.scores.max()
        total = np.exp(self.scores - largest).sum(dtype=np.float64)
        return self.scores - largest - np.float32(np.log(total))

    def token(self, index: int) -> int:
        """The token id at an index of ``scores``."""
        return index if self.token_ids is None else int(self.token_ids[index])

    def dense(self, vocab_size: int) -> Floats:
        """``log_p`` over the whole vocabulary [V], -inf where excluded."""
        if self.token_ids is None:
            return self.log_p
        full = np.full(vocab_size, -np.inf, np.float32)
        full[self.token_ids] = self.log_p
        return full


def stopping_ids(params: SamplingParams, end_ids: Sequence[int]) -> frozenset[int]:
    """The ids that end this answer: its stop ids, and the model's end tokens unless it ignores them."""
    return frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(end_ids))


def choose(
    logits: torch.Tensor,
    params: SamplingParams,
    history: History,
    *,
    seed: int,
    sample: int,
    position: int,
    end_ids: Sequence[int],
) -> int:
    """The target's token for absolute ``position``, given its logits [V]. Raises PdspecError where they are NaN,
    InvalidRequest where every id is excluded."""
    allowed = support(logits, params, history, end_ids=end_ids)
    return pick(allowed, params, lambda ids: gumbel(seed, sample, position, ids))


def support(logits: torch.Tensor, params: SamplingParams, history: History, *, end_ids: Sequence[int]) -> Support:
    """All processors, on one row of logits [V]. Raises as ``choose``."""
    x = _penalised(logits.detach().float().cpu().numpy(), params, history, end_ids)
    largest = x[x.argmax()]  # the first NaN, if there is one
    if largest == -np.inf:
        raise InvalidRequest(
            "every token is excluded", field="allowed_ids", remedy="allow an id that is neither banned nor an early end"
        )
    if not np.isfinite(largest):
        raise PdspecError(f"the target's scores contain {largest}", remedy="report it; KV or weights are damaged")
    if params.temperature == 0.0:
        return Support(token_ids=None, scores=x)
    scaled = (x - largest) / np.float32(params.temperature)
    kept = _truncated(scaled, params)
    return Support(token_ids=kept, scores=scaled if kept is None else scaled[kept])


Noise = Callable[[Ids], Floats]  # g of one position at target ids


def pick(support: Support, params: SamplingParams, noise: Noise) -> int:
    """``argmax(log p + g)`` in float32, ties to the lowest id."""
    scores = support.scores
    if params.temperature == 0.0:
        return support.token(int(scores.argmax()))
    if support.token_ids is None:
        ids = _contenders(scores, noise)
        scores = scores if len(ids) == len(scores) else scores[ids]
    else:
        ids = support.token_ids
    return int(ids[(scores + noise(ids)).argmax()])


def token_logprob(support: Support, token_id: int, top: int) -> TokenLogprob:
    """Log probability of ``token_id`` and of the ``top`` best ids, best first, ties to the lowest id. After all
    processors; at temperature 0 that of the penalised logits."""
    log_p = support.log_p
    if support.token_ids is None:
        index = token_id
    else:
        index = int(np.searchsorted(support.token_ids, token_id))
        if index == len(log_p) or support.token_ids[index] != token_id:
            index = -1
    best = [(support.token(i), float(log_p[i])) for i in _best(log_p, top).tolist() if log_p[i] > -np.inf]
    own = float(log_p[index]) if index >= 0 else -np.inf
    return TokenLogprob(token_id=token_id, logprob=own, top=tuple(best))


def draft_scores(
    logits: torch.Tensor, temperature: float, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A drafter's ``(log_q, log_q + g)`` from logits (or log q) ``[..., draft vocabulary]`` and the noise at its target
    ids (None: g = 0). q gets temperature only; at temperature 0 it is q at temperature 1, and g = 0."""
    if temperature == 0.0:
        log_q = torch.log_softmax(logits, dim=-1)
        return log_q, log_q
    log_q = torch.log_softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    return log_q, log_q if noise is None else log_q + noise


def _contenders(scores: Floats, noise: Noise) -> Ids:
    """The ids, ascending, that can still win: the best id's score with its own noise is what they must reach with the
    largest noise there is. Saves most of the noise on peaked distributions, and changes no choice."""
    best = np.array([scores.argmax()])
    reached = scores[best] + noise(best)
    return np.flatnonzero(scores >= reached - np.float32(LARGEST + 1e-3))


def _penalised(logits: Floats, params: SamplingParams, history: History, end_ids: Sequence[int]) -> Floats:
    """Steps 1-3; the array itself where nothing changes, else a copy."""
    penalises = params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    ending = stopping_ids(params, end_ids) if history.num_output < params.min_tokens else frozenset()
    permitted = history.grammar.allowed(len(logits)) if history.grammar else None
    excludes = bool(params.allowed_ids or params.banned_ids or ending or permitted is not None)
    if not (penalises or params.logit_bias or excludes):
        return logits
    x = logits.copy()
    if penalises:
        output_ids, counts = history.output_counts()
        if params.repetition_penalty != 1.0:
            ids = np.union1d(history.prompt_ids, output_ids)
            factor = np.float32(params.repetition_penalty)
            x[ids] = np.where(x[ids] > 0, x[ids] / factor, x[ids] * factor)
        per_count = np.float32(params.frequency_penalty) * counts.astype(np.float32)
        x[output_ids] -= per_count + np.float32(params.presence_penalty)
    for token_id, bias in params.logit_bias:
        x[token_id] += np.float32(bias)
    if params.allowed_ids:
        excluded = np.ones(len(x), bool)
        excluded[list(params.allowed_ids)] = False
        x[excluded] = -np.inf
    if permitted is not None:
        x[: len(permitted)][~permitted] = -np.inf
        x[len(permitted) :] = -np.inf  # rows of the model that are no tokens
    x[[*params.banned_ids, *ending]] = -np.inf
    return x


def _truncated(x: Floats, params: SamplingParams) -> Ids | None:
    """Step 5 on scaled scores whose largest is 0: the ids kept, ascending, or None where all are."""
    ranked: Ids | None = None
    if 0 < params.top_k < len(x):
        ranked = _best(x, params.top_k)
    if params.top_p < 1.0:
        masses = np.exp(x if ranked is None else x[ranked])
        total = np.float64(masses.sum())  # in pairs: twice as fast as in float64, and as good as float32 is
        if ranked is None:
            ranked = _heaviest(x, masses, params.top_p * total)
            masses = masses[ranked]
        mass = masses.cumsum(dtype=np.float64)
        ranked = ranked[: int(np.searchsorted(mass, params.top_p * total)) + 1]
    if params.min_p > 0.0:
        floor = np.float32(np.log(params.min_p))
        ranked = np.flatnonzero(x >= floor) if ranked is None else ranked[x[ranked] >= floor]
    if ranked is None:
        return None
    return np.sort(ranked[x[ranked] > -np.inf])


def _heaviest(x: Floats, masses: Floats, least: np.float64) -> Ids:
    """Ids whose ``masses`` add up to ``least`` at least, best first, ties to the lowest id; as few as a floor for
    scores gives, since only they are sorted."""
    for floor in _TOP_P_FLOORS:
        ids = np.flatnonzero(x >= np.float32(floor))
        if masses[ids].sum(dtype=np.float64) >= least:
            return ids[_descending(x[ids])]
    return _descending(x)  # a flat distribution


def _best(x: Floats, count: int) -> Ids:
    """Indices of the ``count`` largest, best first, ties to the lowest index."""
    if count <= 0:
        return _no_ids()
    if count >= len(x):
        return _descending(x)
    threshold = np.partition(x, len(x) - count)[len(x) - count]
    candidates = np.flatnonzero(x >= threshold)
    return candidates[_descending(x[candidates])][:count]


def _descending(x: Floats) -> Ids:
    """Indices in descending order of x, ties to the lowest: one sort of integers (order-reversing bits of x, index),
    several times faster than a stable argsort of floats."""
    bits = (x + np.float32(0.0)).view(np.int32)  # -0 becomes 0
    falling = np.where(bits < 0, bits, ~bits & 0x7FFFFFFF).view(np.uint32)
    keys = falling.astype(np.uint64) << np.uint64(32) | np.arange(len(x), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
