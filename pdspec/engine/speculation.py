"""Who drafts how much in each step: the request's tree as it is (``budget: fixed``), or what is worth its time
(``budget: goodput``, see ``budget.py``).

    propose   choose a family for each sequence that has several (``choosing.py``) ─▶ plan a depth for each family
              ─▶ catch up ─▶ draft ─▶ pool all nodes, keep the best
    observe   what was drafted at once; the rows of the others wait, and are made in one batch before the next draft

A sequence that nobody drafts for keeps (hidden, token) rows of its plain steps up to ``draft_queue``; past that it is
draft-cold: decoded plainly to its end, and counted. Under goodput a request's tree is the most that is drafted. Trees
that are drawn from q are verified whole: what was drawn may not decide over what is judged.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pdspec.engine.budget import best_depth, best_nodes, profile
from pdspec.engine.choosing import FamilyChooser
from pdspec.engine.outlook import DEEPEST, Outlook, depth_of, mixed, shallow, spec_of
from pdspec.engine.resources import Resources, tree_spec
from pdspec.engine.steptimes import DraftTimes, VerifyTimes, measure
from pdspec.spec.combined.drafter import CombinedDrafter, HeadOf
from pdspec.spec.protocol import MAX_DEPTH, Draft, DraftContext, Drafter, HiddenRows, Verdict, empty_draft
from pdspec.spec.tree import ChainTree

if TYPE_CHECKING:
    from pdspec.engine.sequence import DecodeSequence

Floats = npt.NDArray[np.float32]
Group = list[tuple[DraftContext, Verdict, HiddenRows]]

_WIDEST = 32  # nodes of one level that are expected
_PACE = 0.2  # what the newest draft counts in what is expected
_FULL_EVERY = 32  # drafts of a family, of which one is as deep as its tree: deeper levels must stay known
_PATIENCE, _MOST_PATIENCE = 16, 256  # plain steps between two probes of a family that is not worth it


class FixedBudget:
    """Every sequence drafts its request's tree, as deep as its answer can use it. ``drafted`` says what the last step's
    proposals were, by family: (depth, sequences); ``behind`` how many sequences had to catch up before."""

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.drafted: dict[str, tuple[int, int]] = {}
        self.behind: dict[str, int] = {}

    def propose(self, sequences: Sequence[DecodeSequence]) -> list[Draft]:
        """A draft for each sequence."""
        drafts: dict[int, Draft] = {}
        self.drafted = {}
        for name, group in self._groups(sequences).items():
            self._draft(name, group, MAX_DEPTH, drafts)
        return [drafts.get(id(sequence)) or empty_draft() for sequence in sequences]

    def observe(self, name: str, group: Group) -> None:
        """Verdicts of the sequences of one family."""
        self._observe(name, group)

    def timed(self, rows: int, kv_tokens: int, seconds: float) -> None:
        """A target forward took so long."""

    def _observe(self, name: str, group: Group) -> None:
        self._learner(name).observe(group)
        for ctx, _, _ in group:
            ctx.observed = ctx.root_position

    def _learner(self, name: str) -> Drafter | HeadOf:
        """Who drafts, and is told what became of it."""
        return self.resources.drafters[name]

    def _groups(self, sequences: Sequence[DecodeSequence]) -> dict[str, list[DecodeSequence]]:
        """By family, those that can use a draft."""
        groups: dict[str, list[DecodeSequence]] = defaultdict(list)
        for sequence in sequences:
            cold = sequence.outlook.cold and not isinstance(sequence.drafter, CombinedDrafter)  # its suffix is not
            if tree_spec(sequence.ctx.tree) is not None and sequence.remaining >= 2 and not cold:
                groups[sequence.drafter.name].append(sequence)
        return groups

    def _draft(self, name: str, group: Sequence[DecodeSequence], depth: int, drafts: dict[int, Draft]) -> float:
        """Drafts no deeper than ``depth`` into ``drafts`` by id of the sequence; the seconds that took."""
        began = time.perf_counter()
        for sequence in group:
            sequence.ctx.deepest = depth
        budgets = [spec_of(sequence).max_nodes for sequence in group]
        proposed = self._learner(name).propose([sequence.ctx for sequence in group], budgets)
        for sequence, draft in zip(group, proposed, strict=True):
            drafts[id(sequence)] = shallow(draft, sequence.remaining - 1)
        deepest = max(min(spec_of(sequence).depth, depth, sequence.remaining - 1) for sequence in group)
        self.drafted[name] = deepest, len(group)
        return time.perf_counter() - began


class GoodputBudget(FixedBudget):
    """Drafts what raises tokens per second. With ``frozen`` times nothing is measured or corrected: what is chosen
    depends on the tables and the requests alone."""

    def __init__(
        self, resources: Resources, *, verify_times: VerifyTimes | None = None,
        draft_times: dict[str, DraftTimes] | None = None, frozen: bool = False,
    ) -> None:
        super().__init__(resources)
        self.verify_times = verify_times or measure(resources)
        self.draft_times: dict[str, DraftTimes] = defaultdict(DraftTimes.none, draft_times or {})
        self.frozen = frozen
        self._expected: dict[str, Floats] = {}  # of families, for sequences that are new
        self._idle: dict[str, int] = defaultdict(int)
        self._patience: dict[str, int] = defaultdict(lambda: _PATIENCE)
        self._drafts: dict[str, int] = defaultdict(int)
        self._plain: dict[int, DecodeSequence] = {}  # by id of their context: not drafted for in this step
        self._families = FamilyChooser(resources.metrics, self.draft_times, frozen=frozen)
        for name in ("budget_nodes_drafted", "budget_nodes_verified", "budget_plain_steps", "budget_probes",
                     "draft_cold"):  # fmt: skip
            resources.metrics.setdefault(name, 0.0)

    def propose(self, sequences: Sequence[DecodeSequence]) -> list[Draft]:
        """A draft for each sequence, empty where none is worth its rows."""
        groups, metrics = self._groups(sequences), self.resources.metrics
        kv_tokens = sum(sequence.num_rows for sequence in sequences)
        self.drafted, self.behind, self._plain = {}, {}, {id(sequence.ctx): sequence for sequence in sequences}
        drafts: dict[int, Draft] = {}
        spent = self._choose_families(groups, len(sequences), kv_tokens, drafts)
        for name, depth in self._plan(groups, len(sequences), kv_tokens).items():
            several = isinstance(self.resources.drafters[name], CombinedDrafter)  # then the head was chosen already
            group, depth = self._chosen(name, groups[name], max(depth, int(several)))
            if not group:
                continue
            self._catch_up(name, group)
            seconds = self._draft(name, group, depth, drafts)
            deepest, count = self.drafted[name]
            spent += float(self._draft_seconds(name, [deepest], count)[0])
            if not self.frozen:
                self.draft_times[name] = self.draft_times[name].corrected(deepest, count, seconds)
            self._expect(name, group, depth, drafts)
            for sequence in group:
                del self._plain[id(sequence.ctx)]
        metrics["budget_plain_steps"] += not drafts
        metrics["budget_nodes_drafted"] += sum(draft.num_nodes for draft in drafts.values())
        self._families.believe(sequences, drafts)
        self._keep_best(drafts, len(sequences), kv_tokens, spent)
        metrics["budget_nodes_verified"] += sum(draft.num_nodes for draft in drafts.values())
        self._families.count(drafts)
        return [drafts.get(id(sequence)) or empty_draft() for sequence in sequences]

    def observe(self, name: str, group: Group) -> None:
        """Those that were drafted for are observed at once; of the others the rows wait. Suffix, which has none, sees
        all of a combined drafter's sequences at once."""
        drafter, now = self.resources.drafters[name], []
        if isinstance(drafter, CombinedDrafter):
            self._families.judge(group)
            drafter.observe_suffix(group)
        waits = bool(drafter.groups or drafter.capture or drafter.want_final)
        for one in group:
            sequence = self._plain.get(id(one[0]))
            if sequence is None or not waits:
                now.append(one)
            elif not sequence.outlook.cold:
                self._hold(sequence.outlook, one)
        if not now:
            return
        began = time.perf_counter()
        self._observe(name, now)
        if not self.frozen:
            own = self.draft_times[observing(name)]
            self.draft_times[observing(name)] = own.corrected(1, len(now), time.perf_counter() - began)

    def _learner(self, name: str) -> Drafter | HeadOf:
        """Of a combined drafter the head: what suffix drafts is chosen before."""
        drafter = self.resources.drafters[name]
        return drafter.as_head if isinstance(drafter, CombinedDrafter) else drafter

    def _choose_families(
        self, groups: dict[str, list[DecodeSequence]], tokens: int, kv_tokens: int, drafts: dict[int, Draft]
    ) -> float:
        """Leaves in ``groups`` whom a head drafts for, puts the drafts of suffix into ``drafts``; seconds of these."""
        spent = 0.0
        for name in [name for name in groups if isinstance(self.resources.drafters[name], CombinedDrafter)]:
            group, drafter = groups.pop(name), self.resources.drafters[name]
            assert isinstance(drafter, CombinedDrafter)
            heads, taken, seconds = self._families.split(
                drafter, group, self._prospects(name, group),
                partial(self._draft_seconds, name, sequences=len(group)),
                tokens=tokens, verify_s=lambda rows: self.verify_times.at(rows, kv_tokens),
            )  # fmt: skip
            drafts.update(taken)
            spent += seconds
            if heads:
                groups[name] = heads
        return spent

    def timed(self, rows: int, kv_tokens: int, seconds: float) -> None:
        """Corrects the target's times."""
        if not self.frozen:
            self.verify_times = self.verify_times.corrected(rows, kv_tokens, seconds)

    def _plan(self, groups: dict[str, list[DecodeSequence]], tokens: int, kv_tokens: int) -> dict[str, int]:
        """A depth for each family; with several, each in turn given what the others draft."""
        prospects = {name: self._prospects(name, group) for name, group in groups.items()}
        deepest = {name: max(depth_of(sequence) for sequence in group) for name, group in groups.items()}
        plan = dict(deepest)
        seconds = {
            name: np.concatenate(([0.0], self._draft_seconds(name, range(1, deepest[name] + 1), len(group))))
            for name, group in groups.items()
        }
        for name in [*groups, *groups] if len(groups) > 1 else groups:
            if any(len(expected) == 0 for expected in prospects[name]):
                continue  # nobody knows: draft
            others = [expected[: plan[other]].ravel() for other in groups if other != name
                      for expected in prospects[other]]
            spent = sum(seconds[other][plan[other]] for other in groups if other != name)
            plan[name], _ = best_depth(
                prospects[name], np.concatenate([np.empty(0, np.float32), *others]), tokens, tokens,
                seconds[name] + spent, lambda rows: self.verify_times.at(rows, kv_tokens),
            )
        return plan

    def _prospects(self, name: str, group: Sequence[DecodeSequence]) -> list[Floats]:
        """What to expect of each sequence [D, W]; [0, 0] where neither it nor its family has drafted."""
        unknown = self._expected.get(name, np.empty((0, 0), np.float32))
        return [
            (unknown if sequence.outlook.expected is None else sequence.outlook.expected)[: depth_of(sequence)]
            for sequence in group
        ]

    def _chosen(self, name: str, group: list[DecodeSequence], depth: int) -> tuple[list[DecodeSequence], int]:
        """Who drafts now, and how deep: all; or nobody but now and then one of those that have waited longest, so that
        what is expected of a family can change."""
        deepest = max(depth_of(sequence) for sequence in group)
        if depth > 0:
            self._idle[name], self._patience[name] = 0, _PATIENCE
            self._drafts[name] += 1
            return group, depth if self._drafts[name] % _FULL_EVERY else deepest
        self._idle[name] += 1
        if self._idle[name] < self._patience[name]:
            return [], 0
        self._idle[name], self._patience[name] = 0, min(_MOST_PATIENCE, 2 * self._patience[name])
        self.resources.metrics["budget_probes"] += 1
        longest = max(group, key=lambda sequence: len(sequence.outlook.held))
        return [longest], depth_of(longest)

    def _catch_up(self, name: str, group: Sequence[DecodeSequence]) -> None:
        behind = [(sequence.ctx, *sequence.outlook.caught_up()) for sequence in group if sequence.outlook.held]
        if behind:
            self.behind[name] = len(behind)
            began = time.perf_counter()
            self._observe(name, behind)
            if isinstance(drafter := self.resources.drafters[name], CombinedDrafter):
                rows = sum(len(verdict.output_ids) for _, verdict, _ in behind)
                self._families.caught_up(drafter, rows, time.perf_counter() - began)

    def _hold(self, outlook: Outlook, one: tuple[DraftContext, Verdict, HiddenRows]) -> None:
        outlook.held.append(one[1:])
        if len(outlook.held) > self.resources.config.draft_queue:
            outlook.held, outlook.cold = [], True
            self.resources.metrics["draft_cold"] += 1

    def _expect(self, name: str, group: Sequence[DecodeSequence], depth: int, drafts: dict[int, Draft]) -> None:
        """Of sequences and family, as deep as was drafted."""
        for sequence in group:
            draft, spec = drafts[id(sequence)], spec_of(sequence)
            if draft.laws:
                continue
            width = 1 if isinstance(spec, ChainTree) else min(_WIDEST, spec.max_nodes)
            found = profile(draft, min(DEEPEST, spec.depth), width)
            outlook = sequence.outlook
            outlook.expected = mixed(outlook.expected, found, depth, _PACE)
            self._expected[name] = mixed(self._expected.get(name), found, depth, _PACE / len(group))

    def _keep_best(self, drafts: dict[int, Draft], tokens: int, kv_tokens: int, spent: float) -> None:
        """Leaves out what is not worth its rows, of all that was chosen and not drawn."""
        free = {key: draft for key, draft in drafts.items() if draft.num_nodes and not draft.laws}
        rows = tokens + sum(len(draft.rows[0]) for draft in drafts.values())
        rows -= sum(draft.num_nodes for draft in free.values())
        kept = best_nodes(list(free.values()), tokens, rows, spent,
                          lambda asked: self.verify_times.at(asked, kv_tokens))
        for (key, draft), nodes in zip(free.items(), kept, strict=True):
            if len(nodes) < draft.num_nodes:
                drafts[key] = draft.part(nodes)

    def _draft_seconds(self, name: str, asked: Sequence[int], sequences: int) -> npt.NDArray[np.float64]:
        """To draft as deep as ``asked`` and to observe what came of it."""
        after = self.draft_times[observing(name)].at([1], sequences)[0]
        return self.draft_times[name].at(asked, sequences) + after


def make_budget(resources: Resources) -> FixedBudget:
    """What the worker's settings ask for. Goodput measures the target's times first."""
    return GoodputBudget(resources) if resources.config.budget == "goodput" else FixedBudget(resources)


def observing(name: str) -> str:
    """Under which name a family's time to observe stands among draft times."""
    return f"{name} observes"
