"""``pdspec check lossless``, part *paths*: with the same noise, the same tokens.

Everything runs on the toy target: production's ``verify`` under drafts that mean harm, every family through the
engines, answers that move, batches that change, and the law of plain decoding itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pdspec.engine.local import LocalGenerator
from pdspec.errors import PdspecError
from pdspec.noise import gumbel
from pdspec.sampling import History, choose
from pdspec.spec.chooser import Seeded
from pdspec.spec.protocol import Draft
from pdspec.spec.ratio import masses_of
from pdspec.spec.registry import family
from pdspec.spec.verify import verify
from pdspec.study.audit import forced_logits
from pdspec.study.chi_square import ALPHA, fit
from pdspec.study.lossless_law import PLAIN, PROCESSED, PROMPT, Target
from pdspec.study.toy import VOCABULARY, toy_tree
from pdspec.types import GenerateRequest, SamplingParams

Result = dict[str, Any]
BATCH = 32
DEPTH = 4  # tokens of an answer under drafts that mean harm
MIXED = (
    PROCESSED, PLAIN, SamplingParams(), SamplingParams(repetition_penalty=1.8),
    SamplingParams(temperature=1.3, top_p=0.7, presence_penalty=0.5), SamplingParams(temperature=0.9, min_p=0.1),
)  # fmt: skip


def cases(local: LocalGenerator, drafters: Sequence[str], large: bool = False) -> Iterator[tuple[str, str]]:
    """(family, tree) of each kind of tree that a family has."""
    for name in drafters:
        for kind in family(name, local.resources.config.plugins).DESCRIPTION.trees or ("",):
            yield name, toy_tree(name, kind, large=large)


def asked(drafter: str, tree: str, params: SamplingParams, seed: int, tokens: int, **changes: Any) -> GenerateRequest:
    """A request for ``tokens`` tokens after a prompt of the seed's own."""
    values = {"prompt_ids": prompt(seed), **changes}
    return GenerateRequest(
        request_id=f"{drafter}-{seed}", drafter=drafter, tree=tree, **values,
        sampling=replace(params, seed=seed, max_tokens=tokens, ignore_eos=True),
    )  # fmt: skip


def prompt(seed: int) -> tuple[int, ...]:
    """One of eight, of different lengths."""
    return (*PROMPT[: 3 + seed % 7], seed % VOCABULARY)


def answers(local: LocalGenerator, requests: Sequence[GenerateRequest]) -> list[tuple[int, ...]]:
    """In batches of up to ``BATCH``."""
    found: list[list[int]] = [[] for _ in requests]
    for start in range(0, len(requests), BATCH):
        for index, chunk in local.generate_batch(requests[start : start + BATCH]):
            found[start + index] += chunk.token_ids
    return [tuple(answer) for answer in found]


def harmful_drafts(local: LocalGenerator, seeds: int) -> Result:
    """``verify`` under trees of random shape and tokens, half of them with plain decoding's path hidden inside, against
    ``choose`` one token at a time."""
    target = Target(local, SamplingParams(), PROMPT)
    rows: dict[tuple[int, ...], torch.Tensor] = {}

    def row(answer: tuple[int, ...]) -> torch.Tensor:
        if answer not in rows:
            tokens = (*target.prompt, *answer)
            rows[answer] = forced_logits(local.resources, tokens, len(tokens) - 1, rows=1)[0]
        return rows[answer]

    nothing, different, accepted = torch.full((VOCABULARY,), torch.nan), 0, 0
    random = np.random.default_rng(5)
    for seed in range(seeds):
        params = MIXED[seed % len(MIXED)]
        plain: tuple[int, ...] = ()
        for position in range(len(PROMPT), len(PROMPT) + DEPTH):
            plain += (choose(row(plain), params, History.of(PROMPT, plain), seed=seed, sample=0, position=position,
                             end_ids=()),)
        tokens: tuple[int, ...] = ()
        while len(tokens) < DEPTH:
            draft, paths = _random_tree(random, plain[len(tokens) :] if random.random() < 0.5 else ())
            reachable = [row(tokens + path) if len(tokens + path) < DEPTH else nothing for path in [(), *paths]]
            found = verify(
                draft, torch.stack(reachable), params, History.of(PROMPT, tokens), Seeded(seed, 0), end_ids=(),
                root_position=len(PROMPT) + len(tokens) - 1, max_new=DEPTH - len(tokens),
            ).verdict
            accepted += found.num_accepted
            tokens += found.output_ids
        different += tokens != plain
    ok = different == 0 and accepted > seeds // 4
    return {"ok": ok, "seeds": seeds, "different": different, "accepted": accepted}


def families(local: LocalGenerator, drafters: Sequence[str], seeds: int, tokens: int) -> Result:
    """Every family and tree through the engines, against drafter none."""
    different: dict[str, int] = {}
    count = 0
    for number, params in enumerate(MIXED):
        own = range(number, seeds, len(MIXED))
        plain = answers(local, [asked("none", "", params, seed, tokens) for seed in own])
        for drafter, tree in cases(local, drafters):
            found = answers(local, [asked(drafter, tree, params, seed, tokens) for seed in own])
            name = f"{drafter} {tree}"
            different[name] = different.get(name, 0) + sum(a != b for a, b in zip(found, plain, strict=True))
            count += len(found)
    return {"ok": not any(different.values()), "answers": count, "tokens": tokens, "different": different}


def plain_law(local: LocalGenerator, seeds: int) -> Result:
    """(t1, t2) of drafter none over seeds against the target's law."""
    request = asked("none", "", PROCESSED, 0, 2, prompt_ids=PROMPT)
    found = answers(local, [replace(request, sampling=replace(request.sampling, seed=s)) for s in range(seeds)])
    tested = fit(Counter(found), Target(local, request.sampling, PROMPT).law(2))
    return {"ok": tested.ok, **vars(tested)}


def samples(local: LocalGenerator, seeds: int) -> Result:
    """The first tokens of two samples of one seed are independent: their joint law is the product."""
    pairs = []
    for sample in (0, 1):
        requests = [asked("none", "", PLAIN, seed, 1, prompt_ids=PROMPT, sample=sample) for seed in range(seeds)]
        pairs.append([token for (token,) in answers(local, requests)])
    law = Target(local, PLAIN, PROMPT).law(1)
    joint = {(a, b): p * q for (a,), p in law.items() for (b,), q in law.items()}
    tested = fit(Counter(zip(*pairs, strict=True)), joint)
    return {"ok": tested.ok, **vars(tested)}


def replay(local: LocalGenerator, drafters: Sequence[str], seeds: int, tokens: int = 12) -> Result:
    """An answer that goes on elsewhere after some of its tokens goes on with the same ones."""
    count = different = 0
    for drafter, tree in cases(local, drafters):
        whole = [asked(drafter, tree, MIXED[seed % 2], seed, tokens) for seed in range(seeds)]
        for request, answer in zip(whole, answers(local, whole), strict=True):
            sent = 1 + count % (tokens - 2)
            rest = replace(
                request, prompt_ids=(*request.prompt_ids, *answer[:sent]), replayed=sent,
                sampling=replace(request.sampling, max_tokens=tokens - sent),
            )  # fmt: skip
            different += answers(local, [rest]) != [answer[sent:]]
            count += 1
    return {"ok": different == 0, "replays": count, "different": different}


def batches(local: LocalGenerator, drafters: Sequence[str], rounds: int) -> Result:
    """Answers of different lengths, families, trees and parameters, together and alone: whoever leaves the batch
    changes nothing for those who stay."""
    count = different = 0
    for number in range(rounds):
        mixed = [
            asked(drafter, tree, MIXED[(index + number) % len(MIXED)], 100 * number + index, 3 + 5 * (index % 5))
            for index, (drafter, tree) in enumerate(cases(local, drafters))
        ]
        alone = [answers(local, [request])[0] for request in mixed]
        different += sum(a != b for a, b in zip(answers(local, mixed), alone, strict=True))
        count += len(mixed)
    return {"ok": different == 0, "answers": count, "different": different}


def ties(local: LocalGenerator, seeds: int, tokens: int = 12) -> Result:
    """Greedy decoding takes the lowest of the best ids, at positions where two are equally good."""
    wrong = found = 0
    requests = [asked("none", "", SamplingParams(), seed, tokens) for seed in range(seeds)]
    for request, answer in zip(requests, answers(local, requests), strict=True):
        ids = [*request.prompt_ids, *answer[:-1]]
        logits = forced_logits(local.resources, ids, len(request.prompt_ids) - 1, rows=1)
        for row, token in zip(logits, answer, strict=True):
            best = torch.nonzero(row == row.max()).flatten().tolist()
            found += len(best) > 1
            wrong += token != best[0]
    return {"ok": wrong == 0 and found > 0, "ties": found, "wrong": wrong}


def coupling(local: LocalGenerator, drafters: Sequence[str], seeds: int) -> Result:
    """Families that draw: with ``coupled`` their chain is the best of log q + g, g being the noise by which the target
    chooses at that position and *target* id; q is what they draw from with ``rejection``."""
    wrong = nodes = 0
    for drafter in drafters:
        if "chain" not in family(drafter, local.resources.config.plugins).DESCRIPTION.trees:
            continue
        for seed in range(seeds):
            coupled, drawn = (
                _first_drafts(local, asked(drafter, "chain(2)", replace(PLAIN, verify=way), seed, 8))
                for way in ("coupled", "rejection")
            )
            for (position, draft), (_, other) in zip(coupled, drawn, strict=True):
                for node in range(min(draft.num_nodes, len(other.laws))):
                    law = other.laws[node - 1]
                    score = law.log_q + gumbel(seed, 0, position + node + 1, law.token_ids)
                    place = np.flatnonzero(law.token_ids == draft.token_ids[node])
                    wrong += len(place) != 1 or float(score.max() - score[place[0]]) > 1e-4
                    nodes += 1
                    if draft.token_ids[node] != other.token_ids[node]:
                        break
    return {"ok": wrong == 0, "nodes": nodes, "wrong": wrong}


def independence(local: LocalGenerator, drafters: Sequence[str], seeds: int) -> Result:
    """With the ratio rule, what a drafter draws, the coin that judges it and the noise by which the last token is drawn
    have nothing to do with one another: their joint law is the product."""
    worst, tested = 1.0, []
    for drafter in drafters:
        counts: Counter[tuple[int, bool, int]] = Counter()
        law = None
        for seed in range(seeds):
            # a flat q, and one root for all seeds
            params = SamplingParams(temperature=4.0, verify="rejection", allowed_ids=(3,))
            request = asked(drafter, "", params, seed, 8, prompt_ids=PROMPT)
            ((position, draft),) = _first_drafts(local, request)
            if not draft.laws:
                break
            chooser, law = Seeded(seed, 0), draft.laws[-1]
            best = law.token_ids[chooser.noise(position + 1, law.token_ids).argmax()]
            counts[int(draft.token_ids[0]), chooser.bernoulli(position + 1, 0, 0.5), int(best)] += 1
        if law is not None:
            ids = law.token_ids.tolist()
            joint = {
                (token, coin, best): q / 2 / len(ids)
                for token, q in zip(ids, masses_of(law).tolist(), strict=True) for coin in (False, True) for best in ids
            }  # fmt: skip
            worst = min(worst, fit(counts, joint).p_value)
            tested.append(drafter)
    return {"ok": worst >= ALPHA, "seeds": seeds, "families": tested, "p_value": worst}


def _first_drafts(local: LocalGenerator, request: GenerateRequest) -> list[tuple[int, Draft]]:
    """(root position, draft) of the first verification: what comes out of a handoff."""
    held: list[list[int]] = []
    try:
        sequence, _ = local.begin(request, held)
        (draft,) = local.decode.propose([sequence])
        return [(sequence.ctx.root_position, draft)]
    finally:
        for pages in held:
            local.resources.pool.release(pages)


def _random_tree(random: np.random.Generator, path: Sequence[int]) -> tuple[Draft, list[tuple[int, ...]]]:
    """Up to eight nodes, ``path`` among them; (draft, the path of every node)."""
    nodes: list[tuple[int, ...]] = [()]
    wanted = [tuple(path[: depth + 1]) for depth in range(len(path))]
    for _ in range(int(random.integers(0, 9))):
        if wanted and random.random() < 0.6:
            node = wanted.pop(0)
        else:
            node = (*nodes[int(random.integers(len(nodes)))], int(random.integers(VOCABULARY)))
        if node not in nodes:
            nodes.append(node)
    if any(node[:-1] not in nodes for node in nodes[1:]):
        raise PdspecError("a node without its parent")
    parents = [nodes.index(node[:-1]) - 1 for node in nodes[1:]]
    unknown = np.full(len(parents), np.nan, np.float32)
    draft = Draft(
        token_ids=np.array([node[-1] for node in nodes[1:]], np.int32), parents=np.array(parents, np.int32),
        log_q=unknown, survival=unknown,
    )
    return draft, nodes[1:]
