"""``pdspec bench step``: where the time of a decode step goes when several answers are written together.

One process, one batch, each setting in turns. The parts of a step: drafting (and observing), the target's forward, and
what is left, which is Python: packing rows, processors and noise, judging, committing. Medians over the steps count, so
that a step during which the machine was away does not. Before them, what more rows cost a forward, and a draft row.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from pdspec.engine.decode import DecodeEngine
from pdspec.engine.local import LocalGenerator
from pdspec.engine.resources import Resources
from pdspec.engine.sequence import DecodeSequence
from pdspec.errors import PdspecError
from pdspec.spec.chooser import Floats, Ids, Seeded
from pdspec.spec.protocol import Draft
from pdspec.spec.verify import VerdictResult
from pdspec.study import step_rows
from pdspec.study.bench_decode import Progress
from pdspec.study.heads import worker_config
from pdspec.study.settings import Setting
from pdspec.study.ways import prompt_ids
from pdspec.types import GenerateRequest, SamplingParams

PYTHON_SHARE, NOISE_SHARE = 0.10, 0.10  # of a step, at most
_WARM = 4


class Timed(DecodeEngine):
    """Notes the milliseconds of each step's parts."""

    def __init__(self, resources: Resources) -> None:
        super().__init__(resources)
        self.parts: dict[str, list[float]] = defaultdict(list)
        self.judging = self.drafted_noise = 0.0
        self.inside = False

    def judge(self, sequence: DecodeSequence, draft: Draft, logits: torch.Tensor) -> VerdictResult:
        """Processors, noise and the walk."""
        began, self.inside = time.perf_counter(), True
        try:
            return super().judge(sequence, draft, logits)
        finally:
            self.inside = False
            self.judging += time.perf_counter() - began

    def timed_step(self, sequences: Sequence[DecodeSequence]) -> None:
        """One step. Raises what a sequence's scores raise."""
        before, self.judging, self.drafted_noise = dict(self.clocks), 0.0, 0.0
        began = time.perf_counter()
        for _, result in self.step(sequences):
            if isinstance(result, PdspecError):
                raise result
        whole = time.perf_counter() - began
        parts = {name: self.clocks[name] - before.get(name, 0.0) for name in ("draft", "forward")}
        parts |= {"python": whole - sum(parts.values()), "sampling": self.judging + self.drafted_noise}
        for name, seconds in parts.items():
            self.parts[name].append(1e3 * seconds)


class Noted(Seeded):
    """Seeded, and what its noise takes outside of judging: a drafter's own."""

    engine: Timed

    def noise(self, position: int, ids: Ids) -> Floats:
        """See Chooser."""
        if self.engine.inside:
            return super().noise(position, ids)
        began = time.perf_counter()
        try:
            return super().noise(position, ids)
        finally:
            self.engine.drafted_noise += time.perf_counter() - began


def run(
    *, worker: dict[str, Any], settings: Sequence[Setting], batch: int, temperature: float, top_p: float,
    prompts: str | None, num_prompts: int, max_tokens: int, runs: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Each setting greedy, and sampled at ``temperature`` and ``top_p``. ``settings`` begin with plain decoding."""
    config = worker_config(worker, [setting.drafter for setting in settings])
    forwards = step_rows.measured(config)
    progress(f"rows: { {rows: round(one['ratio'], 2) for rows, one in forwards['rows'].items()} }")
    ids = prompt_ids(config, prompts, max(num_prompts, batch))[:batch]
    kinds = {"greedy": SamplingParams(), "sampled": SamplingParams(temperature=temperature, top_p=top_p)}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    generator = LocalGenerator(config)
    try:
        for _ in range(runs):
            for setting in settings:
                for kind, params in kinds.items():
                    row = _one(generator, setting, params, ids, max_tokens)
                    found[f"{setting} {kind}"].append(row)
                    progress(f"{setting} {kind}: {row['step']:.2f} ms, Python {row['python_share']:.3f}")
    finally:
        generator.resources.close()
    table = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    floors: list[dict[str, Any]] = [
        *step_rows.floors(forwards),
        {"name": "python_share", "wanted": PYTHON_SHARE, "found": table[f"{settings[0]} greedy"]["python_share"]},
        {"name": "sampling_share", "wanted": NOISE_SHARE, "found": table[f"{settings[0]} sampled"]["sampling_share"]},
    ]
    floors = [{**floor, "ok": floor["found"] <= floor["wanted"]} for floor in floors]
    return {
        "ok": all(floor["ok"] for floor in floors), "floors": floors, **forwards, "settings": table, "batch": batch,
        "temperature": temperature, "top_p": top_p,
    }  # fmt: skip


def _one(
    generator: LocalGenerator, setting: Setting, params: SamplingParams, ids: Sequence[tuple[int, ...]], max_tokens: int
) -> dict[str, float]:
    """Median milliseconds of the parts of steps in which all answers took part, and their shares."""
    engine, running = Timed(generator.resources), []
    held: list[list[int]] = []
    try:
        for index, one in enumerate(ids):
            sampling = SamplingParams(
                temperature=params.temperature, top_p=params.top_p, max_tokens=max_tokens, ignore_eos=True, seed=index
            )
            request = GenerateRequest(
                request_id=f"{index}", prompt_ids=one, drafter=setting.drafter, tree=setting.tree, sampling=sampling
            )
            sequence, _ = generator.begin(request, held)
            chooser = Noted(*sequence.ctx.noise_key)
            object.__setattr__(chooser, "engine", engine)  # Seeded is frozen
            sequence.ctx.other_chooser = chooser
            running.append(sequence)
        while all(sequence.finish is None for sequence in running):
            engine.timed_step(running)
        tokens = statistics.fmean(sequence.num_output - 1 for sequence in running)
    finally:
        for pages in held:
            generator.resources.pool.release(pages)
    row = {name: statistics.median(times[_WARM:] or times) for name, times in engine.parts.items()}
    row["step"] = row["draft"] + row["forward"] + row["python"]  # a pause falls into one part of a step, not into all
    shares = {f"{name}_share": row[name] / row["step"] for name in ("python", "sampling", "draft")}
    return {**row, **shares, "acceptance_length": tokens / engine.steps}
