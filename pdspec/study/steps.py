"""``pdspec study {medusa-paths,min-sync}``: the production step against another, over the same requests in batches.

Behind the handoff the requests of the first batch wait for each other before one of them is decoded; then each that
ends makes room for the next. An engine that advances all in step takes batch after batch instead. ``kv_bytes``,
``draft_kv_bytes`` and ``hidden_bytes`` crossed the handoff; ``bytes_read`` is what the target's forwards had to read
(weights and KV).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.engine.serving import RunningWorker
from pdspec.errors import ConfigError
from pdspec.spec.registry import family
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.other_steps import Counting, PathByPath, Synchronised
from pdspec.study.pair import Pair, Traced
from pdspec.study.ways import REMEMBERING, Progress, Served, Way, prompt_ids, row
from pdspec.types import GenerateRequest, GenerationStats


@dataclass(frozen=True, kw_only=True)
class Study:
    """``engines`` by what a row calls them; ``tree`` is drafted where none is asked for (empty: the family's)."""

    engines: dict[str, type[Counting]]
    needs: str  # kind of tree that a family must draft
    tree: str


STUDIES = {
    "medusa-paths": Study(
        engines={"one tree": Counting, "path by path": PathByPath}, needs="static", tree="static(2x2x1)"
    ),
    "min-sync": Study(engines={"continuous": Counting, "synchronised minimum": Synchronised}, needs="chain", tree=""),
}


def run(
    study: str, *, worker: dict[str, Any], drafters: Sequence[str], tree: str, temperatures: Sequence[float],
    sequences: int, prompts: str | None, num_prompts: int, max_tokens: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The table of one study, ``sequences`` requests decoded together. ``ok``: both engines and both paths wrote the
    same tokens. Families without a head draft with a random one (``random_heads``). Raises ConfigError for a family
    that the study says nothing about, and for fewer than two tokens an answer."""
    asked = STUDIES[study]
    for name in drafters:
        if name in REMEMBERING or asked.needs not in family(name).DESCRIPTION.trees:
            raise ConfigError(f"study {study} says nothing about {name}", field="drafters",
                              remedy=f"name a family that drafts {asked.needs} trees and remembers no earlier answers")
    if max_tokens < 2:
        raise ConfigError(f"{max_tokens} tokens need no verification", field="max_tokens", remedy="ask for 2 or more")
    config, random_heads = with_random_heads(worker_config(worker, drafters))
    ids = prompt_ids(config, prompts, num_prompts)
    ways = [
        Way(drafter=name, tree=tree or asked.tree or family(name).DESCRIPTION.default_tree, temperature=temperature)
        for temperature in temperatures for name in drafters
    ]  # fmt: skip
    cases = {(way, label): way.requests(ids, max_tokens) for way in ways for label in asked.engines}
    alone = _in_one_process(config, asked, cases, sequences, progress)
    behind = _behind_the_handoff(config, asked, cases, sequences, progress)
    rows = [
        {"setting": label, "sequences": sequences, **row(way, behind[way, label][0], alone[way, label][0]),
         **_figures(behind[way, label])}
        for way, label in cases
    ]  # fmt: skip
    first = {way: behind[way, next(iter(asked.engines))][0].answers for way in ways}
    same = all(behind[way, label][0].answers == first[way] for way, label in cases)
    return {
        "ok": same and all(one["same_answers"] for one in rows), "study": study, "prompts": len(ids),
        "max_tokens": max_tokens, "random_heads": list(random_heads), "rows": rows,
    }  # fmt: skip


Cases = dict[tuple[Way, str], list[GenerateRequest]]
Outcomes = dict[tuple[Way, str], tuple[Served, Counting]]


def _in_one_process(
    config: WorkerConfig, asked: Study, cases: Cases, sequences: int, progress: Progress
) -> Outcomes:
    generator, found = LocalGenerator(config), Outcomes()
    try:
        for (way, label), requests in cases.items():
            engine = asked.engines[label](generator.resources)
            generator.decode, answers = engine, list[Traced]()
            for batch in _batches(requests, sequences):
                answers += Traced.batch(generator.generate_batch(batch), len(batch))
            found[way, label] = _served(answers, engine), engine
            progress(f"in one process: {way} {label}: {found[way, label][0].acceptance_length:.3f} per verification")
    finally:
        generator.resources.close()
    return found


def _behind_the_handoff(
    config: WorkerConfig, asked: Study, cases: Cases, sequences: int, progress: Progress
) -> Outcomes:
    found = Outcomes()
    with Pair(config) as pair:
        host = pair.decode.engine.host
        for (way, label), requests in cases.items():
            engine = asked.engines[label](host.resources)
            pair.on_engine(pair.decode, lambda engine=engine: setattr(host, "decode", engine))  # type: ignore[misc]
            answers = list[Traced]()
            for batch in _batches(requests, sequences if engine.in_step else len(requests)):
                together = min(sequences, len(batch))
                with gathered(pair.decode, together):
                    answers += pair.ask(batch, concurrent=together)
            found[way, label] = _served(answers, engine), engine
            length = found[way, label][0].acceptance_length
            progress(f"behind the handoff: {way} {label}: {length:.3f} per verification")
    return found


@contextmanager
def gathered(worker: RunningWorker, count: int) -> Iterator[None]:
    """The decode worker takes no step before ``count`` answers are ready for it; from then on it does as always."""
    host = worker.engine.host
    real, begun = host.step, False

    def step() -> bool:
        nonlocal begun
        begun = begun or len(host.scheduler.running) >= count
        return bool(real()) if begun or host.prompts else False

    Pair.on_engine(worker, lambda: setattr(host, "step", step))
    try:
        yield
    finally:
        Pair.on_engine(worker, lambda: delattr(host, "step"))


def _batches(requests: Sequence[GenerateRequest], size: int) -> list[Sequence[GenerateRequest]]:
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def _served(answers: Sequence[Traced], engine: Counting) -> Served:
    return Served(
        answers=tuple(answer.tokens for answer in answers),
        stats=tuple(answer.stats or GenerationStats() for answer in answers),
        clocks=dict(engine.clocks), decode_seconds=sum(engine.clocks.values()),
    )  # fmt: skip


def _figures(outcome: tuple[Served, Counting]) -> dict[str, Any]:
    """What both studies add to a row: times of whole steps, forwards, bytes read, tokens thrown away."""
    served, engine = outcome
    tokens = sum(len(answer) - 1 for answer in served.answers)
    return {
        "steps": engine.steps, "step_ms": 1e3 * served.decode_seconds / engine.steps,
        "forwards_per_step": engine.forwards / engine.steps, "bytes_read": engine.bytes_read,
        "bytes_read_per_token": engine.bytes_read / tokens, "discarded_tokens": engine.discarded,
    }  # fmt: skip
