"""The budget's side of ``families``: what each family of a combined drafter offers, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

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
)
from pdspec.engine.outlook import depth_of, shallow, spec_of
from pdspec.engine.steptimes import DraftTimes
from pdspec.spec.combined.drafter import CombinedDrafter
from pdspec.spec.protocol import MAX_DEPTH, Draft, DraftContext, HiddenRows, Verdict

if TYPE_CHECKING:
    from pdspec.engine.sequence import DecodeSequence

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class FamilyChooser:
    """Of one budget. ``metrics`` counts the verifications that each family drafted for, and the changes from one to
    another; ``times`` are the budget's draft times, corrected unless ``frozen``."""

    def __init__(self, metrics: dict[str, float], times: dict[str, DraftTimes], *, frozen: bool) -> None:
        self._metrics, self._times, self._frozen = metrics, times, frozen
        self._made: dict[int, tuple[DecodeSequence, Draft | None]] = {}  # by id of the context, before it was trimmed
        # Of all sequences, for those that are new. Suffix promises about four times what is right (``combined``).
        self._known = {SUFFIX: Evidence(prior=0.25), HEAD: Evidence()}
        for name in (SUFFIX, HEAD, NOBODY, "changes"):
            metrics.setdefault(f"family_{name}", 0.0)

    def split(
        self, drafter: CombinedDrafter, group: Sequence[DecodeSequence], prospects: Sequence[Floats],
        head_seconds: Callable[[Sequence[int]], Doubles], *, tokens: int, verify_s: Callable[[npt.NDArray], Doubles],
    ) -> tuple[list[DecodeSequence], dict[int, Draft], float]:  # fmt: skip
        """(sequences for the head, suffix's drafts by id of their sequence, seconds of suffix). ``prospects`` [D, W]
        are what the head should have accepted of each sequence (empty: nobody knows), ``head_seconds`` what it takes
        to draft as deep for the whole group."""
        began = time.perf_counter()
        for sequence in group:
            sequence.ctx.deepest = MAX_DEPTH
        found = drafter.suffix_drafts([s.ctx for s in group], [spec_of(s).max_nodes for s in group])
        drafts = [shallow(draft, s.remaining - 1) for s, draft in zip(group, found, strict=True)]
        spent = self._spent(drafter, len(group), time.perf_counter() - began)
        offers = [
            [*self._suffix(s, draft, spent / len(group)), *self._head(drafter, s, known, head_seconds, len(group))]
            for s, draft, known in zip(group, drafts, prospects, strict=True)
        ]
        chosen = choose(offers, tokens, tokens, verify_s)
        taken: dict[int, Draft] = {}
        for sequence, draft, family in zip(group, drafts, chosen, strict=True):
            sequence.outlook.family = family
            if family == SUFFIX:
                taken[id(sequence)] = draft
            drafter.count(sequence.ctx, suffix=family == SUFFIX, head=False)
        return [s for s, family in zip(group, chosen, strict=True) if family == HEAD], taken, spent

    def believe(self, sequences: Sequence[DecodeSequence], drafts: dict[int, Draft]) -> None:
        """Before the best nodes are kept: chances in ``drafts`` become those that earlier drafts bear out."""
        self._made = {}
        for sequence in sequences:
            if isinstance(sequence.drafter, CombinedDrafter):
                draft = drafts.get(id(sequence))
                self._made[id(sequence.ctx)] = sequence, draft
                if draft is not None and draft.num_nodes and not draft.laws:
                    drafts[id(sequence)] = believed(draft, self._evidence(sequence, sequence.outlook.family))

    def count(self, drafts: dict[int, Draft]) -> None:
        """What is verified in the end, of the sequences that have a choice."""
        for sequence, _ in self._made.values():
            draft, outlook = drafts.get(id(sequence)), sequence.outlook
            family = outlook.family if draft is not None and draft.num_nodes else NOBODY
            self._metrics[f"family_{family}"] += 1
            if family != NOBODY:
                self._metrics["family_changes"] += outlook.drafted not in ("", family)
                outlook.drafted = family

    def judge(self, group: Sequence[tuple[DraftContext, Verdict, HiddenRows]]) -> None:
        """After a verification: evidence of whoever drafted, all of it a little older."""
        for ctx, verdict, _ in group:
            sequence, draft = self._made.pop(id(ctx), (None, None))
            if sequence is None:
                continue
            for known in sequence.outlook.evidence.values():
                known.fade()
            if draft is not None:
                found, family = judged(draft, verdict.output_ids), sequence.outlook.family
                self._evidence(sequence, family).add(*found)
                self._known[family].add(*found)

    def caught_up(self, drafter: CombinedDrafter, rows: int, seconds: float) -> None:
        """The head was given so many rows."""
        if not self._frozen:
            name = _catching_up(drafter)
            self._times[name] = self._times[name].corrected(rows, 1, seconds)

    def _evidence(self, sequence: DecodeSequence, family: str) -> Evidence:
        """Of a sequence, which begins with what its family had right elsewhere."""
        evidence = sequence.outlook.evidence
        if family not in evidence:
            evidence[family] = Evidence(prior=self._known[family].credibility)
        return evidence[family]

    def _suffix(self, sequence: DecodeSequence, draft: Draft, seconds: float) -> list[Offer]:
        evidence = self._evidence(sequence, SUFFIX)
        return [Offer(family=SUFFIX, survival=believed(draft, evidence).survival, seconds=seconds,
                      curiosity=evidence.curiosity(sequence.verifications))]  # fmt: skip

    def _head(
        self, drafter: CombinedDrafter, sequence: DecodeSequence, known: Floats,
        head_seconds: Callable[[Sequence[int]], Doubles], count: int,
    ) -> list[Offer]:  # fmt: skip
        """At each depth; where nobody knows what it has accepted, an offer that nothing outbids."""
        outlook, deepest = sequence.outlook, depth_of(sequence)
        if outlook.cold:
            return []
        evidence = self._evidence(sequence, HEAD)
        if not len(known) and evidence.told is None:
            return [Offer(family=HEAD, survival=np.ones(1, np.float32), seconds=0.0, curiosity=np.inf)]
        behind = float(self._times[_catching_up(drafter)].at([outlook.behind], 1)[0]) if outlook.behind else 0.0
        late = paid_off(behind, sequence.remaining)
        curious = evidence.curiosity(sequence.verifications)
        if not len(known):  # what drafts that are drawn promise is not kept: what they had accepted is
            assert evidence.told is not None
            seconds = float(head_seconds([deepest])[0]) / count
            return [Offer(family=HEAD, survival=accepted_each(evidence.told), seconds=seconds + late,
                          curiosity=curious)]  # fmt: skip
        chances = credible(known, np.arange(1, len(known) + 1, dtype=np.int32)[:, None], evidence)
        return [
            Offer(family=HEAD, survival=chances[:depth].ravel(), seconds=seconds / count + late,
                  curiosity=curious)
            for depth, seconds in enumerate(head_seconds(range(1, min(deepest, len(known)) + 1)), start=1)
        ]  # fmt: skip

    def _spent(self, drafter: CombinedDrafter, count: int, seconds: float) -> float:
        name = f"{drafter.name} {SUFFIX}"
        if not self._frozen:
            self._times[name] = self._times[name].corrected(1, count, seconds)
        return float(self._times[name].at([1], count)[0])


def _catching_up(drafter: CombinedDrafter) -> str:
    return f"{drafter.name} catches up"
