"""Recording an answer in one process: every draft with p and q, every verdict, KV rows and weights read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pdspec.engine.decode import DecodeEngine, StepResult
from pdspec.engine.local import LocalGenerator, check
from pdspec.engine.resources import Resources
from pdspec.engine.sequence import DecodeSequence
from pdspec.model.ops import Rope
from pdspec.model.tokenizer import CONTEXT, Tokenizer
from pdspec.sampling import support
from pdspec.spec.protocol import Draft
from pdspec.spec.tree import depths
from pdspec.spec.verify import VerdictResult
from pdspec.study.machine import weight_bytes
from pdspec.types import GenerateRequest

Record = dict[str, Any]
TOP = 4  # of the target's best tokens that are kept of each row it judged
_DIGITS = 5
_ONCE = ("medusa",)  # all heads read once a draft, however deep


class Texts:
    """Single tokens as people read them, each after what stands before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def piece(self, before: Sequence[int], token: int) -> str:
        """The text that ``token`` adds to the ids ``before`` it; special tokens as they are written."""
        context = list(before[-CONTEXT:])
        known = self._tokenizer.decode(context, skip_special_tokens=False)
        whole = self._tokenizer.decode([*context, token], skip_special_tokens=False)
        return whole[len(known) :] if whole.startswith(known) else self._tokenizer.decode([token])


class Recorder(DecodeEngine):
    """The decode engine, which also tells ``on_step`` of each verification of the one sequence it is given."""

    def __init__(self, resources: Resources, texts: Texts, on_step: Callable[[Record], None]) -> None:
        super().__init__(resources)
        self._texts, self._on_step = texts, on_step
        self._record: Record = {}
        group = resources.runner.group
        self.target_bytes = weight_bytes(resources.files.config, resources.config.dtype)
        self.kv_row_bytes = group.row_bytes * group.num_layers

    def judge(self, sequence: DecodeSequence, draft: Draft, logits: torch.Tensor) -> VerdictResult:
        """As ever, and notes what it saw."""
        found = super().judge(sequence, draft, logits)
        self._record = self._seen(sequence, draft, logits, found)
        return found

    def step(self, sequences: Sequence[DecodeSequence]) -> list[StepResult]:
        """One verification, told once it is committed."""
        before = dict(self.clocks)
        results = super().step(sequences)
        if self._record:
            spent = {f"{name}_ms": round(1e3 * (self.clocks[name] - before.get(name, 0.0)), 3) for name in self.clocks}
            (sequence,) = sequences
            after = sequence.drafter.rows_at(sequence.num_rows)
            self._on_step({**self._record, **spent, "kv_after": sequence.num_rows, "draft_after": sum(after.values())})
            self._record = {}
        return results

    def _seen(self, sequence: DecodeSequence, draft: Draft, logits: torch.Tensor, found: VerdictResult) -> Record:
        ids, verdict = sequence.ctx.token_ids, found.verdict
        paths = _paths(draft)
        rows = {-1: self._law(sequence, logits[0], [])}
        for parent in {int(one) for one in draft.parents if one >= 0} | set(verdict.path):
            rows[parent] = self._law(sequence, logits[1 + parent], [int(draft.token_ids[n]) for n in paths[parent]])
        nodes = []
        for node, (token, parent) in enumerate(zip(draft.token_ids.tolist(), draft.parents.tolist(), strict=True)):
            before = [*ids, *(int(draft.token_ids[one]) for one in paths[node][:-1])]
            log_q = float(draft.log_q[node])
            nodes.append({
                "t": self._texts.piece(before, token), "parent": parent, "p": _rounded(rows[parent][token]),
                "q": None if np.isnan(log_q) else _rounded(np.exp(log_q)),
                "s": _rounded(float(draft.survival[node])),
            })  # fmt: skip
        visited = [-1, *verdict.path]
        judged = [self._best(rows[row], [*ids, *verdict.output_ids[:place]]) for place, row in enumerate(visited)]
        depth = int(depths(draft.parents).max(initial=0))
        kv = sequence.num_rows
        return {
            "nodes": nodes, "path": list(verdict.path), "judged": judged,
            "out": [self._texts.piece([*ids, *verdict.output_ids[:place]], token)
                    for place, token in enumerate(verdict.output_ids)],
            "out_p": [_rounded(rows[row][token]) for row, token in zip(visited, verdict.output_ids, strict=True)],
            "kv_before": kv, "kv_peak": kv + 1 + len(draft.rows[0]),
            "draft_before": sum(sequence.drafter.rows_at(kv).values()),
            "draft_forwards": min(1, depth) if sequence.drafter.name in _ONCE else depth,
        }  # fmt: skip

    def _law(self, sequence: DecodeSequence, row: torch.Tensor, path: Sequence[int]) -> np.ndarray:
        """p of the whole vocabulary after ``path``, processors applied."""
        history = sequence.history.extended(path) if path else sequence.history
        allowed = support(row, sequence.request.sampling, history, end_ids=self.resources.end_ids)
        return np.exp(allowed.dense(self.resources.files.config.vocab_size))

    def _best(self, law: np.ndarray, before: Sequence[int]) -> list[tuple[str, float]]:
        return [(self._texts.piece(before, int(one)), _rounded(law[one])) for one in np.argsort(-law)[:TOP]]


def record(
    generator: LocalGenerator, tokenizer: Tokenizer, request: GenerateRequest, *,
    on_step: Callable[[Record], None] = lambda step: None,
) -> Record:  # fmt: skip
    """The whole answer. ``on_step`` is told of each verification as it happens. Raises PdspecError."""
    check(generator.resources, request)
    texts, steps = Texts(tokenizer), list[Record]()

    def told(step: Record) -> None:
        steps.append(step)
        on_step(step)

    engine, own = Recorder(generator.resources, texts, told), generator.decode
    generator.decode = engine
    try:
        chunks = list(generator.generate(request))
    finally:
        generator.decode = own
    ids = [token for chunk in chunks for token in chunk.token_ids]
    drafter = generator.resources.drafter(request.drafter)
    stats = chunks[-1].stats
    verifications = stats.verifications if stats else 0
    return {
        "prompt": tokenizer.decode(request.prompt_ids, skip_special_tokens=False),
        "prompt_tokens": len(request.prompt_ids), "first": texts.piece(request.prompt_ids, ids[0]),
        "steps": steps, "tokens": len(ids), "finish": str(chunks[-1].finish_reason or ""),
        "drafter": drafter.name, "tree": generator.resources.tree(drafter, request.tree),
        "temperature": request.sampling.temperature, "seed": str(request.sampling.seed),
        "acceptance_length": round((len(ids) - 1) / verifications, 4) if verifications else 0.0,
        "drafted": sum(len(step["nodes"]) for step in steps), "accepted": sum(len(step["path"]) for step in steps),
        "target_bytes": engine.target_bytes, "draft_bytes": held_bytes(drafter, generator.resources.cache),
        "kv_row_bytes": engine.kv_row_bytes,
    }  # fmt: skip


def held_bytes(drafter: object, cache: object) -> int:
    """Bytes of the weights that a drafter reads in one forward: all tensors it holds, each once, but for embeddings
    (one row is read of them), the pages of ``cache``, and RoPE tables."""
    seen = {one.untyped_storage().data_ptr() for one in _reachable(cache, set())}
    total = 0
    for one in _reachable(drafter, set()):
        data = one.untyped_storage().data_ptr()
        if data not in seen and one.dtype.is_floating_point | (one.dtype == torch.int8):
            seen.add(data)
            total += one.nbytes
    return total


_SKIPPED = ("embedding", "_ops", "ops", "_scratch", "scratch")


def _reachable(one: object, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(one) in seen or isinstance(one, Rope):
        return
    seen.add(id(one))
    if isinstance(one, torch.Tensor):
        yield one
    elif isinstance(one, dict):
        for name, value in one.items():
            if name not in _SKIPPED:
                yield from _reachable(value, seen)
    elif isinstance(one, (list, tuple)):
        for value in one:
            yield from _reachable(value, seen)
    elif type(one).__module__.startswith("pdspec."):
        yield from _reachable(getattr(one, "__dict__", {}), seen)
        slots = getattr(type(one), "__slots__", ())
        yield from _reachable([getattr(one, name, None) for name in slots if name not in _SKIPPED], seen)


def _paths(draft: Draft) -> list[list[int]]:
    """Of each node the nodes from the root's child to itself."""
    paths: list[list[int]] = []
    for node, parent in enumerate(draft.parents.tolist()):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


def _rounded(value: float) -> float:
    return float(f"{float(value):.{_DIGITS}g}")
