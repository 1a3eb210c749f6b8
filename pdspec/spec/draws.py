"""How a drafter that has a q picks children, by the request's way of verification (DESIGN 5):

    coupled                        the best of log q + g, g the target's noise of the position
    rejection, chain or static     drawn from q without replacement, by noise of the drafter's own; q is kept
    rejection, dynamic; T = 0      the best of log q

A dynamic tree keeps the nodes that came out likely, and what was chosen by its value was not drawn: there the ratio
rule judges children as if nobody had drawn them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pdspec.spec.chooser import Chooser, Floats, Ids, Indices
from pdspec.spec.protocol import Candidates, DraftContext, Law
from pdspec.spec.tree import DynamicTree, TreeSpec
from pdspec.types import Verify


@dataclass(frozen=True)
class Drawing:
    """In place of noise, where the children at a position are drawn from q."""

    chooser: Chooser
    position: int

    def order(self, target_ids: Ids, log_q: Floats, count: int) -> Indices:
        """``count`` indices of a law, in the order of the draws. Nodes of one depth draw by the same noise: a
        verification meets the children of one of them at most."""
        return self.chooser.order(self.position, target_ids, log_q, count)


def draws_from_q(ctx: DraftContext, spec: TreeSpec) -> bool:
    """Whether children are drawn, and their law kept."""
    ratio = ctx.sampling.verify in (Verify.REJECTION, Verify.BLOCK)
    return ratio and ctx.sampling.temperature > 0.0 and not isinstance(spec, DynamicTree)


def position_noise(
    ctx: DraftContext, spec: TreeSpec, depth: int, target_ids: torch.Tensor
) -> torch.Tensor | Drawing | None:
    """What is added to log q [D] at ``depth`` below the root, at the draft's ``target_ids`` [D]; None: nothing; a
    ``Drawing``: children are drawn."""
    if draws_from_q(ctx, spec):
        return Drawing(ctx.chooser, ctx.root_position + depth)
    return candidate_noise(ctx, depth, target_ids)


def candidate_noise(ctx: DraftContext, depth: int, target_ids: torch.Tensor) -> torch.Tensor | None:
    """What first draft tokens are chosen by, to be shipped: the coupling's noise or none. Never the drafter's own: q
    cut to tokens that were picked by it would not be what the first child is drawn from."""
    if ctx.sampling.temperature == 0.0 or ctx.sampling.verify != Verify.COUPLED:
        return None
    return torch.from_numpy(ctx.chooser.noise(ctx.root_position + depth, target_ids.cpu().numpy()))


def cut_law(candidates: Candidates) -> Law:
    """q of the first draft after a handoff: cut to the W shipped ids, and normalised again."""
    log_q = candidates.log_q.astype(np.float64)
    largest = log_q.max()
    total = largest + np.log(np.exp(log_q - largest).sum())
    return Law(token_ids=candidates.token_ids.astype(np.int64), log_q=(log_q - total).astype(np.float32))
