"""Verification: which nodes of a draft the target would have put out itself, and the one token more that it gives.

``coupled`` (the default) walks along the tokens that the target chooses with the noise of each position: the output is
a function of (target, prompt, seed) alone, and the draft decides only how many tokens one forward yields. ``rejection``
and ``block`` give the same distribution by the ratio rule (``ratio.py``). At temperature 0 all are the greedy walk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pdspec.sampling import History, Support, pick, stopping_ids, support, token_logprob
from pdspec.spec.chooser import Chooser
from pdspec.spec.protocol import Draft, Verdict
from pdspec.spec.ratio import Masses, judge, judge_block
from pdspec.types import SamplingParams, TokenLogprob, Verify


@dataclass(frozen=True, kw_only=True)
class VerdictResult:
    """A verdict and, where asked for, the log probabilities of its outputs, one each."""

    verdict: Verdict
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Verification:
    """One draft under the target's scores. Node -1 is the root; processors run only on visited rows, each with the
    history of its own path."""

    draft: Draft
    logits: torch.Tensor
    params: SamplingParams
    history: History
    chooser: Chooser
    root_position: int
    end_ids: Sequence[int]
    children: dict[int, list[int]]

    def support(self, path: Sequence[int]) -> Support:
        """What the target may choose from after ``path``."""
        history = self.history.extended([self.token(node) for node in path]) if path else self.history
        row = self.logits[1 + path[-1]] if path else self.logits[0]
        return support(row, self.params, history, end_ids=self.end_ids)

    def token(self, node: int) -> int:
        """Its target id."""
        return int(self.draft.token_ids[node])

    def below(self, path: Sequence[int]) -> list[int]:
        """The children at the end of ``path``, in order."""
        return self.children.get(path[-1] if path else -1, [])

    def coupled_step(self, path: Sequence[int], allowed: Support) -> tuple[int, int]:
        """(child or -1, token) by the noise of the position."""
        position = self.root_position + 1 + len(path)
        token = pick(allowed, self.params, lambda ids: self.chooser.noise(position, ids))
        return next((node for node in self.below(path) if self.token(node) == token), -1), token

    def ratio_step(self, path: Sequence[int], allowed: Support) -> tuple[int, int]:
        """(child or -1, token) by the ratio rule."""
        position, children = self.root_position + 1 + len(path), self.below(path)
        law = self.draft.laws.get(path[-1] if path else -1)
        tokens = [self.token(node) for node in children]
        taken, rest = judge(Masses.of(allowed), tokens, law, position, self.chooser)
        if taken >= 0:
            return children[taken], tokens[taken]
        return -1, rest.drawn(position, self.chooser)

    def block(self) -> tuple[list[int], list[int], list[Support]]:
        """(path, tokens put out, supports they came from) of a chain judged as a whole."""
        nodes = list(range(self.draft.num_nodes))
        supports = [self.support(nodes[:depth]) for depth in range(len(nodes) + 1)]
        tokens = [self.token(node) for node in nodes]
        laws = [self.draft.laws[node - 1] for node in nodes]
        taken, rest = judge_block([Masses.of(one) for one in supports], tokens, laws, self.root_position, self.chooser)
        last = rest.drawn(self.root_position + 1 + taken, self.chooser)
        return nodes[:taken], [*tokens[:taken], last], supports[: taken + 1]

    def walk(self, stops: frozenset[int], max_new: int) -> tuple[list[int], list[int], list[Support]]:
        """The same node by node, no further than a token that stops the answer or is the ``max_new``-th."""
        step = self.coupled_step if self.params.temperature == 0 or _couples(self.params) else self.ratio_step
        path: list[int] = []
        output: list[int] = []
        supports: list[Support] = []
        while True:
            supports.append(self.support(path))
            child, token = step(path, supports[-1])
            output.append(token)
            if child < 0 or token in stops or len(output) == max_new:
                return path, output, supports
            path.append(child)


def verify(
    draft: Draft, logits: torch.Tensor, params: SamplingParams, history: History, chooser: Chooser, *,
    root_position: int, end_ids: Sequence[int], max_new: int, logprobs: int | None = None,
) -> VerdictResult:
    """The target's tokens from the root on, as far as the draft foresaw them.

    ``logits`` [1 + N, V]: row 0 is the root's and predicts ``root_position + 1``, row 1 + i is node i's. ``history``
    includes the root. All randomness comes from ``chooser``. The walk ends with a token that is not a child, that stops
    the answer, or that is the ``max_new``-th (>= 1); this last token is never in the path, so ``len(output_ids) ==
    len(path) + 1`` always: it is the next root, not yet in the target's KV. ``logprobs`` n: report each output's log
    probability and the n best. Raises as ``sampling.choose``.
    """
    if len(logits) != 1 + draft.num_nodes:
        raise ValueError(f"{len(logits)} logit rows for a draft of {draft.num_nodes} nodes")
    if max_new < 1:
        raise ValueError(f"a verification puts out at least one token, not max_new={max_new}")
    task = _Verification(
        draft=draft, logits=logits, params=params, history=history, chooser=chooser, root_position=root_position,
        end_ids=end_ids, children=_children(draft),
    )
    stops = stopping_ids(params, end_ids)
    if params.verify == Verify.BLOCK and params.temperature > 0 and _is_drawn_chain(draft):
        path, output, supports = task.block()
        ends = [index for index, token in enumerate(output) if token in stops]
        count = min(max_new, len(output), *(index + 1 for index in ends))
        path, output = path[: count - 1], output[:count]
    else:
        path, output, supports = task.walk(stops, max_new)
    reported: tuple[TokenLogprob, ...] = ()
    if logprobs is not None:
        reported = tuple(token_logprob(one, token, logprobs) for one, token in zip(supports, output, strict=False))
    return VerdictResult(verdict=Verdict(path=tuple(path), output_ids=tuple(output)), logprobs=reported)


def _couples(params: SamplingParams) -> bool:
    return params.verify in (Verify.COUPLED, Verify.GREEDY)


def _is_drawn_chain(draft: Draft) -> bool:
    return bool(draft.laws) and bool((draft.parents == np.arange(draft.num_nodes) - 1).all())


def _children(draft: Draft) -> dict[int, list[int]]:
    """Children of each node, in order. Raises ValueError for siblings that are alike or a child before its parent."""
    children: dict[int, list[int]] = defaultdict(list)
    seen: dict[tuple[int, int], int] = {}
    for node, (parent, token) in enumerate(zip(draft.parents.tolist(), draft.token_ids.tolist(), strict=True)):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} stands before its parent {parent}")
        if seen.setdefault((parent, token), node) != node:
            raise ValueError(f"nodes {seen[parent, token]} and {node} are the same child of {parent}")
        children[parent].append(node)
    return children
