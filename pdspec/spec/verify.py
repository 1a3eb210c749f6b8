"""Coupled verification: walk the draft tree along the tokens that the target chooses with the noise of each position.

The output is a function of (target, prompt, seed) alone; the draft decides only how many tokens one forward yields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pdspec.sampling import History, pick, stopping_ids, support, token_logprob
from pdspec.spec.protocol import Draft, Verdict
from pdspec.types import SamplingParams, TokenLogprob


@dataclass(frozen=True, kw_only=True)
class VerdictResult:
    """A verdict and, where asked for, the log probabilities of its outputs, one each."""

    verdict: Verdict
    logprobs: tuple[TokenLogprob, ...] = ()


def verify(
    draft: Draft, logits: torch.Tensor, params: SamplingParams, history: History,
    *, seed: int, sample: int, root_position: int, end_ids: Sequence[int], max_new: int, logprobs: int | None = None,
) -> VerdictResult:
    """The target's tokens from the root on, as far as the draft foresaw them.

    ``logits`` [1 + N, V]: row 0 is the root's and predicts ``root_position + 1``, row 1 + i is node i's. ``history``
    includes the root. Processors run only on visited rows, each with its own history. The walk ends with a token
    that is not a child, that stops the answer, or that is the ``max_new``-th (>= 1); this last token is never in
    the path, so ``len(output_ids) == len(path) + 1`` always: it is the next root, not yet in the target's KV.
    ``logprobs`` n: report each output's log probability and the n best. Raises as ``sampling.choose``.
    """
    if len(logits) != 1 + draft.num_nodes:
        raise ValueError(f"{len(logits)} logit rows for a draft of {draft.num_nodes} nodes")
    if max_new < 1:
        raise ValueError(f"a verification puts out at least one token, not max_new={max_new}")
    children = _children(draft)
    stops = stopping_ids(params, end_ids)
    path: list[int] = []
    output: list[int] = []
    reported: list[TokenLogprob] = []
    node = -1
    while True:
        allowed = support(logits[1 + node], params, history, end_ids=end_ids)
        position = root_position + 1 + len(path)
        token = pick(allowed, params, seed=seed, sample=sample, position=position)
        output.append(token)
        if logprobs is not None:
            reported.append(token_logprob(allowed, token, logprobs))
        child = children.get((node, token))
        if child is None or token in stops or len(output) == max_new:
            break
        path.append(child)
        history = history.extended((token,))
        node = child
    verdict = Verdict(path=tuple(path), output_ids=tuple(output))
    return VerdictResult(verdict=verdict, logprobs=tuple(reported))


def _children(draft: Draft) -> dict[tuple[int, int], int]:
    """(parent, token id) → node. Raises ValueError for siblings that are alike or a child before its parent."""
    children: dict[tuple[int, int], int] = {}
    for node, (parent, token) in enumerate(zip(draft.parents.tolist(), draft.token_ids.tolist(), strict=True)):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} stands before its parent {parent}")
        if children.setdefault((parent, token), node) != node:
            raise ValueError(f"nodes {children[parent, token]} and {node} are the same child of {parent}")
    return children
