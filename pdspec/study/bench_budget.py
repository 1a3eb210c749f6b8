"""``pdspec bench budget``: the goodput budget against every fixed setting, on counted rows and measured step times.

Each setting decodes the same prompts at a steady concurrency; what its steps were (rows of the forward, KV tokens read,
depth and sequences of the drafts) is counted and priced with one table of step times. So the figures depend on the
table alone: the same table gives the same figures, however busy the machine is while it counts. The table is measured
first, or taken from an earlier report.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.engine.decode import DecodeEngine, DecodeSequence
from pdspec.engine.local import LocalGenerator
from pdspec.engine.resources import Resources
from pdspec.engine.speculation import FixedBudget, GoodputBudget, Group, observing
from pdspec.engine.steptimes import DraftTimes, VerifyTimes, measure
from pdspec.errors import ConfigError, PdspecError
from pdspec.spec.suffix.drafter import SuffixDrafter
from pdspec.spec.tree import parse_tree
from pdspec.study.ways import Progress, Way, prompt_ids
from pdspec.types import GenerateRequest

REMEMBERING = ("combined",)  # its suffix half would know the answers from the setting before
BEST_SHARE, NONE_SHARE = 0.97, 0.98
_SWEEP_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step as it is priced: drafts are (depth, sequences) by family, ``behind`` sequences that caught up before."""

    rows: int
    kv_tokens: int
    drafted: dict[str, tuple[int, int]]
    behind: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Step times: of the target, and of the drafts of each tree (observing them included)."""

    verify: VerifyTimes
    drafts: dict[str, dict[str, DraftTimes]]  # by tree

    def seconds(self, step: Step, tree: str) -> float:
        """What a step of a setting with ``tree`` costs."""
        total = float(self.verify.at(step.rows, step.kv_tokens))
        for name, (depth, sequences) in step.drafted.items():
            total += float(self.drafts[tree][name].at([depth], sequences)[0])
            total += float(self.drafts[tree][observing(name)].at([1], sequences)[0])
        for name, sequences in step.behind.items():
            total += float(self.drafts[tree][observing(name)].at([1], sequences)[0])
        return total

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        drafts = {tree: {name: one.to_json() for name, one in times.items()} for tree, times in self.drafts.items()}
        return {"verify": self.verify.to_json(), "drafts": drafts}

    @classmethod
    def from_json(cls, values: dict[str, Any], trees: Sequence[str]) -> Table:
        """What ``to_json`` gave. Raises ConfigError where it says nothing of a tree."""
        try:
            drafts = {
                tree: {name: DraftTimes.from_json(one) for name, one in values["drafts"][tree].items()}
                for tree in trees
            }
            return cls(verify=VerifyTimes.from_json(values["verify"]), drafts=drafts)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the table says nothing of {error}", field="table",
                              remedy="measure it with the same drafter and trees") from error


class CountedFixed(FixedBudget):
    """Notes every step."""

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources)
        self.steps: list[Step] = []

    def timed(self, rows: int, kv_tokens: int, seconds: float) -> None:
        self.steps.append(Step(rows=rows, kv_tokens=kv_tokens, drafted=self.drafted, behind=self.behind))


class CountedGoodput(GoodputBudget):
    """The same, by frozen tables."""

    def __init__(self, resources: Resources, table: Table, tree: str) -> None:
        super().__init__(resources, verify_times=table.verify, draft_times=table.drafts[tree], frozen=True)
        self.steps: list[Step] = []

    def timed(self, rows: int, kv_tokens: int, seconds: float) -> None:
        self.steps.append(Step(rows=rows, kv_tokens=kv_tokens, drafted=self.drafted, behind=self.behind))


class Sweeping(FixedBudget):
    """Drafts to each depth of a tree in turn, and notes how long that and observing took."""

    def __init__(self, resources: Resources, depth: int) -> None:
        super().__init__(resources)
        self.deepest, self.turn = depth, 0
        self.seconds: dict[tuple[str, int, int], list[float]] = defaultdict(list)

    def _draft(self, name: str, group: Sequence[DecodeSequence], depth: int, drafts: dict[int, Any]) -> float:
        self.turn += 1
        seconds = super()._draft(name, group, 1 + self.turn % self.deepest, drafts)
        self.seconds[(name, *self.drafted[name])].append(seconds)
        return seconds

    def observe(self, name: str, group: Group) -> None:
        began = time.perf_counter()
        super().observe(name, group)
        self.seconds[observing(name), 1, len(group)].append(time.perf_counter() - began)

    def fitted(self) -> dict[str, DraftTimes]:
        """Of the median of each (depth, sequences) that was seen."""
        times: dict[str, DraftTimes] = defaultdict(DraftTimes.none)
        for (name, depth, sequences), found in sorted(self.seconds.items()):
            times[name] = times[name].corrected(depth, sequences, statistics.median(found))
        return dict(times)


def run(
    *, worker: dict[str, Any], drafter: str, trees: Sequence[str], cap: str, concurrency: Sequence[int],
    temperature: float, prompts: str | None, num_prompts: int, max_tokens: int, table: dict[str, Any] | None,
    wall_pairs: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``trees`` are the fixed settings of ``drafter`` beside ``none``, ``cap`` is what goodput may draft at most.
    ``wall_pairs`` > 0 times as many interleaved pairs of it and the best fixed setting. Raises ConfigError."""
    if drafter in REMEMBERING or drafter == "none":
        raise ConfigError(f"{drafter} cannot be compared with itself here", field="drafter", remedy="name a family of"
                          " drafts that forgets between requests, or suffix")
    every = list(dict.fromkeys([*trees, cap]))
    config = WorkerConfig.from_mapping(
        {**worker, "drafter": drafter, "drafters": ("none", drafter), "survival": "online", "budget": "fixed"}
    )
    generator = LocalGenerator(config)
    try:
        ids = prompt_ids(config, prompts, num_prompts)
        bench = Bench(generator, drafter, temperature, ids, max_tokens)
        times = Table.from_json(table, every) if table else bench.table(every, max(concurrency), progress)
        rows = {str(count): bench.compare(times, trees, cap, count, progress) for count in concurrency}
        if wall_pairs:
            for count in concurrency:
                rows[str(count)]["wall"] = bench.wall(rows[str(count)]["best_fixed"], cap, count, wall_pairs, progress)
    finally:
        generator.resources.close()
    return {
        "ok": all(row["ok"] for row in rows.values()), "drafter": drafter, "cap": cap, "temperature": temperature,
        "prompts": len(ids), "max_tokens": max_tokens, "concurrency": rows, "table": times.to_json(),
    }  # fmt: skip


class Bench:
    """One engine, and the prompts that every setting decodes."""

    def __init__(
        self, generator: LocalGenerator, drafter: str, temperature: float, ids: Sequence[tuple[int, ...]],
        max_tokens: int,
    ) -> None:  # fmt: skip
        self.generator, self.drafter, self.temperature = generator, drafter, temperature
        self.ids, self.max_tokens = ids, max_tokens

    def table(self, trees: Sequence[str], most: int, progress: Progress) -> Table:
        """Measured now: the target's staircase, then drafts of each tree at one sequence and at ``most``."""
        resources = self.generator.resources
        verify, drafts = measure(resources), {}
        for tree in trees:
            sweep = Sweeping(resources, parse_tree(tree).depth)
            for count in sorted({1, most}):
                self._decode(sweep, tree, count, _SWEEP_TOKENS if count > 1 else 2 * _SWEEP_TOKENS, 1)
            drafts[tree] = sweep.fitted()
            progress(f"measured drafts of {tree}")
        return Table(verify=verify, drafts=drafts)

    def compare(self, table: Table, trees: Sequence[str], cap: str, count: int, progress: Progress) -> dict[str, Any]:
        """All settings at one concurrency, priced by the table."""
        fixed = {"none": self._priced(CountedFixed(self.generator.resources), table, "none", "", count)}
        for tree in trees:
            fixed[tree] = self._priced(CountedFixed(self.generator.resources), table, self.drafter, tree, count)
        goodput = self._priced(CountedGoodput(self.generator.resources, table, cap), table, self.drafter, cap, count)
        best = max(fixed, key=lambda name: fixed[name]["tokens_per_second"])
        rate = goodput["tokens_per_second"]
        to_best, to_none = (rate / fixed[name]["tokens_per_second"] for name in (best, "none"))
        same = len({one.pop("answers") for one in (*fixed.values(), goodput)}) == 1
        progress(f"{count} at once: goodput {rate:.1f} tokens/s, best fixed {best} {rate / to_best:.1f},"
                 f" none {rate / to_none:.1f}")
        return {
            "ok": same and to_best >= BEST_SHARE and to_none >= NONE_SHARE, "fixed": fixed, "goodput": goodput,
            "best_fixed": best, "ratio_to_best": to_best, "ratio_to_none": to_none, "same_tokens": same,
        }  # fmt: skip

    def wall(self, best: str, cap: str, count: int, pairs: int, progress: Progress) -> dict[str, Any]:
        """Seconds of goodput, its times corrected as it goes, and of the best fixed setting, in turns: the mean of the
        ratios of their rates, with a 95 % confidence interval."""
        resources, ratios = self.generator.resources, []
        goodput = GoodputBudget(resources)
        name, tree = ("none", "") if best == "none" else (self.drafter, best)
        for index in range(pairs):
            seconds = {}
            for own in (True, False) if index % 2 else (False, True):
                budget = goodput if own else FixedBudget(resources)
                began = time.perf_counter()
                self._decode(budget, cap if own else tree, count, self.max_tokens, 1 if own else 0,
                             self.drafter if own else name, forget=False)
                seconds[own] = time.perf_counter() - began
            ratios.append(seconds[False] / seconds[True])
        mean, spread = statistics.fmean(ratios), statistics.stdev(ratios) if pairs > 1 else 0.0
        progress(f"{count} at once, wall clock: {mean:.3f} of the best fixed setting")
        return {"ratio_to_best": mean, "confidence_95": 2.31 * spread / pairs**0.5, "ratios": ratios}

    def _priced(
        self, budget: CountedFixed | CountedGoodput, table: Table, name: str, tree: str, count: int
    ) -> dict[str, Any]:
        answers = self._decode(budget, tree, count, self.max_tokens, 0, name)
        tokens = sum(len(answer) - 1 for answer in answers)
        seconds = sum(table.seconds(step, tree) for step in budget.steps)
        return {
            "tokens_per_second": tokens / seconds, "steps": len(budget.steps),
            "rows_per_step": sum(step.rows for step in budget.steps) / len(budget.steps),
            "drafted_share": sum(bool(step.drafted) for step in budget.steps) / len(budget.steps),
            "tokens_per_step": tokens / len(budget.steps), "answers": answers,
        }  # fmt: skip

    def _decode(
        self, budget: FixedBudget, tree: str, count: int, max_tokens: int, rounds: int, name: str = "",
        forget: bool = True,
    ) -> tuple[tuple[int, ...], ...]:
        """All prompts (``rounds`` > 0: so many per seat), ``count`` at once, the next as soon as one has ended."""
        resources = self.generator.resources
        name = name or self.drafter
        if forget:
            self._forget(resources)
        engine = DecodeEngine(resources)
        engine.budget = budget
        way = Way(drafter=name, tree=tree, temperature=self.temperature)
        waiting = way.requests(self.ids, max_tokens)[: rounds * count or None][::-1]
        answers: dict[str, list[int]] = {}
        running: dict[str, tuple[DecodeSequence, list[int]]] = {}
        while waiting or running:
            while waiting and len(running) < count:
                self._begin(waiting.pop(), running, answers)
            for sequence, result in engine.step([sequence for sequence, _ in running.values()]):
                if isinstance(result, PdspecError):
                    raise result
                answers[result.request_id] += result.token_ids
                if sequence.finish:
                    resources.pool.release(running.pop(result.request_id)[1])
        return tuple(tuple(answers[key]) for key in sorted(answers))

    def _begin(
        self, request: GenerateRequest, running: dict[str, tuple[DecodeSequence, list[int]]],
        answers: dict[str, list[int]],
    ) -> None:
        held: list[list[int]] = []
        sequence, chunk = self.generator.begin(request, held)
        running[request.request_id] = sequence, held[0]
        answers[request.request_id] = list(chunk.token_ids)

    def _forget(self, resources: Resources) -> None:
        """What was learned from the setting before."""
        drafter: Any = resources.drafters[self.drafter]
        if isinstance(drafter, SuffixDrafter):
            drafter = resources.drafters[self.drafter] = SuffixDrafter()
        if hasattr(drafter, "use_survival"):
            drafter.use_survival("online")
