"""What the budgets know of one sequence, and what its request lets it draft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pdspec.engine.families import Evidence
from pdspec.engine.resources import tree_spec
from pdspec.spec.protocol import Draft, HiddenRows, Verdict
from pdspec.spec.tree import TreeSpec, depths

if TYPE_CHECKING:
    from pdspec.engine.sequence import DecodeSequence

DEEPEST = 32  # levels that are planned


Floats = npt.NDArray[np.float32]


@dataclass(kw_only=True)
class Outlook:
    """What a sequence's drafts have promised, ``expected`` [D, W] survival by depth (None: no draft yet), and the
    verifications that its drafter has not seen. Where the budget chooses among several families: ``evidence`` of each,
    the ``family`` that was chosen last, and the one whose draft was verified last (``drafted``)."""

    expected: Floats | None = None
    held: list[tuple[Verdict, HiddenRows]] = field(default_factory=list)
    cold: bool = False
    evidence: dict[str, Evidence] = field(default_factory=dict)
    family: str = ""
    drafted: str = ""

    @property
    def behind(self) -> int:
        """Rows that its drafter has not seen."""
        return sum(len(verdict.output_ids) for verdict, _ in self.held)

    def caught_up(self) -> tuple[Verdict, HiddenRows]:
        """What was held, as one verification that accepted all tokens but the last; nothing is held then."""
        tokens = tuple(token for verdict, _ in self.held for token in verdict.output_ids)
        hidden = HiddenRows.joined([rows for _, rows in self.held])
        self.held = []
        return Verdict(path=tuple(range(len(tokens) - 1)), output_ids=tokens), hidden


def shallow(draft: Draft, depth: int) -> Draft:
    """The nodes that an answer of ``depth + 1`` more tokens can use."""
    if draft.num_nodes == 0 or draft.num_nodes <= depth:
        return draft
    keep = depths(draft.parents) <= depth
    return draft if keep.all() else draft.part(np.flatnonzero(keep))


def spec_of(sequence: DecodeSequence) -> TreeSpec:
    """The request's tree, of a family that drafts."""
    spec = tree_spec(sequence.ctx.tree)
    assert spec is not None
    return spec


def depth_of(sequence: DecodeSequence) -> int:
    """Levels that it can use."""
    return min(spec_of(sequence).depth, sequence.remaining - 1, DEEPEST)


def mixed(before: Floats | None, found: Floats, depth: int, pace: float) -> Floats:
    """``found`` mixed into what was expected, down to ``depth``; trees of a family may differ in size."""
    if before is None:
        return found
    shape = max(before.shape[0], found.shape[0]), max(before.shape[1], found.shape[1])
    old, new = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    old[: before.shape[0], : before.shape[1]] = before
    new[: found.shape[0], : found.shape[1]] = found
    old[:depth] += pace * (new[:depth] - old[:depth])
    return old
