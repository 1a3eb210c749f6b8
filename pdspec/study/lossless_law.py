"""``pdspec check lossless``, part *law*: what speculative decoding puts out, exactly.

The production engine runs on the toy target with a Chooser that enumerates. Every outcome of the drafter's draws, of
the coins and of the last token has its probability (float64); added up they must be the target's own law.

    answer so far ──every draft, with its chance──▶ every verdict, with its chance ──▶ longer answers, each once

What follows an answer depends on its tokens alone, so each is continued once: by a whole engine step that repeats the
choices that led there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pdspec.engine.local import LocalGenerator
from pdspec.engine.sequence import DecodeSequence
from pdspec.errors import PdspecError
from pdspec.sampling import History, Support, support
from pdspec.spec.protocol import Draft
from pdspec.study.audit import forced_logits
from pdspec.study.outcomes import Enumerating, largest_difference, outcomes_of
from pdspec.types import GenerateRequest, SamplingParams

LARGEST_DIFFERENCE = 1e-9
PROMPT = (0, 3, 1, 5, 0, 3, 2, 0, 3)  # repeats, so that suffixes match
PROCESSED = SamplingParams(
    temperature=0.7, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias=((5, 0.5),), seed=11
)
PLAIN = SamplingParams(temperature=1.0, seed=12)
Tokens = tuple[int, ...]
Law = dict[Tokens, float]


def masses(allowed: Support) -> np.ndarray:
    """p in float64, from the scores alone."""
    scores = allowed.scores.astype(np.float64)
    mass = np.exp(scores - scores.max())
    return mass / mass.sum()


@dataclass
class Target:
    """The target's own law, from its scores and the processors, with no decoding in between."""

    local: LocalGenerator
    params: SamplingParams
    prompt: Tokens
    _after: dict[Tokens, tuple[Tokens, np.ndarray]] = field(default_factory=dict)

    def next(self, answer: Tokens) -> tuple[Tokens, np.ndarray]:
        """(token ids, their chances) after ``answer``."""
        if answer not in self._after:
            resources, tokens = self.local.resources, (*self.prompt, *answer)
            (row,) = forced_logits(resources, tokens, len(tokens) - 1, rows=1)
            history = History.of(self.prompt, answer)
            allowed = support(row, self.params, history, end_ids=resources.end_ids)
            mass = masses(allowed)
            self._after[answer] = tuple(allowed.token(index) for index in range(len(mass))), mass
        return self._after[answer]

    def law(self, length: int, answer: Tokens = ()) -> Law:
        """Of the next ``length`` tokens."""
        if length == 0:
            return {(): 1.0}
        return _mixed(
            ((token,), float(chance), self.law(length - 1, (*answer, token)))
            for token, chance in zip(*self.next(answer), strict=True) if chance > 0.0
        )  # fmt: skip


@dataclass
class Enumeration:
    """All that an engine can answer to a request. ``steps`` counts the answers that were continued, ``drafts`` the
    drafts with a node that were judged."""

    local: LocalGenerator
    steps: int = 0
    drafts: int = 0
    worst_total: float = 0.0  # distance of any sum of probabilities from 1
    accepted: float = 0.0  # expected in one verification, at most
    _known: dict[Tokens, Law] = field(default_factory=dict)

    def run(self, request: GenerateRequest) -> tuple[Tokens, Law]:
        """(the first token, which prefill fixes by the seed; the law of all that follow it)."""
        held: list[list[int]] = []
        try:
            sequence, _ = self.local.begin(request, held)
            return tuple(sequence.ctx.token_ids[len(request.prompt_ids) :]), self._after(sequence)
        finally:
            for pages in held:
                self.local.resources.pool.release(pages)

    def _after(self, sequence: DecodeSequence) -> Law:
        if sequence.remaining == 0:
            return {(): 1.0}
        key = tuple(sequence.ctx.token_ids)
        if key not in self._known:
            chances, ways = self._step(sequence)
            self.worst_total = max(self.worst_total, abs(sum(chances.values()) - 1.0))
            self.steps += 1
            self._known[key] = _mixed(
                (output, chance, self._after(self._continued(sequence, output, ways[output])))
                for output, chance in chances.items()
            )
        return self._known[key]

    def _step(self, sequence: DecodeSequence) -> tuple[Law, dict[Tokens, list[int]]]:
        """The chance of every output of one verification, and the choices that led to it first."""
        engine, resources = self.local.decode, self.local.resources
        chances: Law = {}
        accepted = 0.0
        ways: dict[Tokens, list[int]] = {}

        def propose(chooser: Enumerating) -> tuple[Draft, list[int]]:
            (draft,) = engine.propose([_copied(sequence, chooser)])
            return draft, chooser.taken

        drafts: dict[bytes, tuple[Draft, list[int], float]] = {}  # alike ones are judged once
        for (draft, drawn), chance in outcomes_of(propose):
            _, first, before = drafts.get(_key(draft), (draft, drawn, 0.0))
            drafts[_key(draft)] = draft, first, before + chance
        for draft, drawn, drawn_chance in drafts.values():
            self.drafts += draft.num_nodes > 0
            output = resources.runner.forward(engine.pack([sequence], [draft]), resources.cache)
            logits = output.logits[: 1 + draft.num_nodes]

            def judge(
                chooser: Enumerating, draft: Draft = draft, logits: Any = logits
            ) -> tuple[Tokens, list[int]]:
                seen = replace(sequence, ctx=copy.copy(sequence.ctx))
                seen.ctx.other_chooser = chooser
                found = engine.judge(seen, draft, logits)
                return found.verdict.output_ids, chooser.taken

            for (tokens, judged), chance in outcomes_of(judge):
                chances[tokens] = chances.get(tokens, 0.0) + drawn_chance * chance
                ways.setdefault(tokens, [*drawn, *judged])
                accepted += (len(tokens) - 1) * drawn_chance * chance
        self.accepted = max(self.accepted, accepted)
        return chances, ways

    def _continued(self, sequence: DecodeSequence, output: Tokens, choices: list[int]) -> DecodeSequence:
        """After a whole engine step in which these choices were made. Raises PdspecError when it puts out another
        ``output``, also after a second look: a drafter that remembers other answers may draft differently by now."""
        found: Any = None
        for again in (False, True):
            if again:
                choices = self._step(sequence)[1][output]
            chooser = Enumerating(list(choices))
            following = _copied(sequence, chooser)
            ((_, chunk),) = self.local.decode.step([following])
            found = chunk if isinstance(chunk, PdspecError) else chunk.token_ids
            if found == output and chooser.taken == choices:
                return following
        raise PdspecError(f"a step that repeats {choices} put out {found}, not {output}")


def law_case(
    local: LocalGenerator, drafter: str, tree: str, verify: str, params: SamplingParams, tokens: int
) -> dict[str, Any]:
    """One family, tree and way of verification: how far the law of ``tokens`` tokens is from the target's."""
    request = GenerateRequest(
        request_id="law", prompt_ids=PROMPT, drafter=drafter, tree=tree,
        sampling=replace(params, verify=verify, max_tokens=tokens, ignore_eos=True),
    )  # fmt: skip
    enumeration = Enumeration(local)
    first, served = enumeration.run(request)
    difference = largest_difference(served, Target(local, request.sampling, PROMPT).law(tokens - 1, first))
    ok = difference <= LARGEST_DIFFERENCE and enumeration.worst_total <= 1e-12
    ok = ok and (enumeration.accepted > 0.0) == (drafter != "none")
    return {
        "ok": ok, "drafter": drafter, "tree": tree, "verify": verify, "temperature": params.temperature,
        "max_abs_difference": difference, "outcomes": len(served), "drafts": enumeration.drafts,
        "steps": enumeration.steps, "accepted": enumeration.accepted, "worst_total": enumeration.worst_total,
    }  # fmt: skip


def _copied(sequence: DecodeSequence, chooser: Enumerating) -> DecodeSequence:
    """The sequence as it is, with what a step changes its own. KV behind the root is scratch, and shared."""
    ctx = copy.copy(sequence.ctx)
    ctx.token_ids, ctx.state, ctx.other_chooser = list(ctx.token_ids), copy.deepcopy(ctx.state), chooser
    return replace(sequence, ctx=ctx)


def _mixed(parts: Any) -> Law:
    """The law of ``head + tail`` of (head, its chance, law of tails)."""
    law: Law = {}
    for head, chance, tails in parts:
        for tail, weight in tails.items():
            law[head + tail] = law.get(head + tail, 0.0) + chance * weight
    return law

def _key(draft: Draft) -> bytes:
    """Drafts of one key have the same nodes, drawn from the same laws."""
    laws = [(str(node).encode(), law.log_q.tobytes()) for node, law in sorted(draft.laws.items())]
    return b" ".join([draft.token_ids.tobytes(), draft.parents.tobytes(), *(part for law in laws for part in law)])
