"""Part *proposals* of ``pdspec check handoff``: behind the handoff every family proposes what it would propose in one
process, and as much of it is accepted, in every verification.

Families that remember earlier answers propose the same only to the same requests in the same order: each of their cases
has workers of its own, and one request follows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pdspec.client import RouterClient
from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.spec.registry import family
from pdspec.study.pair import CONCURRENT, Traced
from pdspec.study.parity import trees_of
from pdspec.study.stack import Stack
from pdspec.study.ways import REMEMBERING
from pdspec.types import GenerateRequest, UserRequest

Progress = Callable[[str], object]
HANDOFFS = ("direct", "relay")
CHUNKS = {"chunked": 24, "unchunked": 2048}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to hand over one family's state."""

    chunks: str
    drafter: str
    tree: str
    handoff: str
    draft_prefill: str

    def __str__(self) -> str:
        return f"{self.chunks} {self.handoff} draft_prefill={self.draft_prefill} {self.drafter} {self.tree}".strip()

    def of(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """The requests, asked in this way."""
        return [
            replace(one, drafter=self.drafter, tree=self.tree, draft_prefill=self.draft_prefill, trace=True)
            for one in requests
        ]


@contextmanager
def one_process(config: WorkerConfig) -> Iterator[LocalGenerator]:
    """The reference, closed behind the block."""
    generator = LocalGenerator(config)
    try:
        yield generator
    finally:
        generator.resources.close()


def local(generator: LocalGenerator, requests: Sequence[GenerateRequest], together: int = CONCURRENT) -> list[Traced]:
    """The answers in this process, ``together`` at a time."""
    found: list[Traced] = []
    for start in range(0, len(requests), together):
        part = requests[start : start + together]
        found += Traced.batch(generator.generate_batch(part), len(part))
    return found


def served(
    endpoint: str, requests: Sequence[GenerateRequest], handoff: str, together: int = CONCURRENT
) -> list[Traced]:
    """The answers of a deployment, ``together`` at a time."""

    def ask(request: GenerateRequest) -> Traced:
        user = UserRequest(
            prompt_ids=request.prompt_ids, sampling=request.sampling, drafter=request.drafter, tree=request.tree,
            draft_prefill=request.draft_prefill, handoff=handoff, trace=True,
        )  # fmt: skip
        with RouterClient(endpoint) as client:
            return Traced.of([piece.chunk for piece in client.stream(user)])

    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(ask, requests))


def proposals(
    config: WorkerConfig, drafters: Sequence[str], base: Sequence[GenerateRequest], progress: Progress
) -> dict[str, Any]:
    """The part of the report; ``verifications`` by family. Raises ConfigError."""
    trees, wanted = _wanted(config, drafters, base)
    different: list[str] = []
    verifications = dict.fromkeys(drafters, 0)
    cases = 0
    for stack_of in _stacks(drafters, trees):
        with Stack(config, prefill_changes={"chunk": CHUNKS[stack_of[0].chunks]}) as stack:
            for case in stack_of:
                requests, together = case.of(base), 1 if case.drafter in REMEMBERING else CONCURRENT
                answers = served(stack.endpoint, requests, case.handoff, together)
                pairs = zip(answers, wanted[case.drafter, case.tree], strict=True)
                bad = [request.request_id for request, (a, b) in zip(requests, pairs, strict=True) if a != b]
                different += [f"{case}: {one}" for one in bad]
                cases += len(answers)
                verifications[case.drafter] += sum(len(answer.traces) for answer in answers)
                progress(f"  {case}: {len(bad)} of {len(answers)} differ")
    return {"ok": not different, "cases": cases, "verifications": verifications, "trees": trees,
            "different": different[:20]}  # fmt: skip


def _wanted(
    config: WorkerConfig, drafters: Sequence[str], base: Sequence[GenerateRequest]
) -> tuple[dict[str, list[str]], dict[tuple[str, str], list[Traced]]]:
    """Each family's trees, and what it does in one process with each."""
    wanted = {}
    with one_process(config) as generator:
        trees = {name: trees_of(generator.resources.drafters[name]) for name in drafters}
        for name in (one for one in drafters if one not in REMEMBERING):
            for tree in trees[name]:
                wanted[name, tree] = local(generator, [replace(r, drafter=name, tree=tree, trace=True) for r in base])
    for name in (one for one in drafters if one in REMEMBERING):
        for tree in trees[name]:
            with one_process(config) as fresh:
                wanted[name, tree] = local(fresh, [replace(r, drafter=name, tree=tree, trace=True) for r in base], 1)
    return trees, wanted


def _stacks(drafters: Sequence[str], trees: dict[str, list[str]]) -> list[list[Case]]:
    """The cases of each deployment."""
    every = [
        Case(chunks=chunks, drafter=name, tree=tree, handoff=handoff, draft_prefill=side)
        for chunks in CHUNKS for name in drafters for handoff in HANDOFFS for side in _sides(name)
        for tree in trees[name]
    ]  # fmt: skip
    shared = [[case for case in every if case.chunks == c and case.drafter not in REMEMBERING] for c in CHUNKS]
    return [*filter(None, shared), *([case] for case in every if case.drafter in REMEMBERING)]


def _sides(name: str) -> tuple[str, ...]:
    """Who may prefill a family's draft state: where nothing is shipped, it makes no difference."""
    return ("prefill", "decode") if family(name).DESCRIPTION.ships else ("prefill",)
