"""The ratio rule's output law, exactly: every outcome of drawing and judging, weighed, must add up to the target's."""

import numpy as np
import pytest
import torch

from pdspec.sampling import History
from pdspec.spec.protocol import Draft, Law
from pdspec.spec.verify import verify
from pdspec.study.outcomes import largest_difference, law_of, outcomes_of
from pdspec.types import SamplingParams

VOCABULARY = 4
PROMPT = (1, 2)


def row(*prefix):
    """The target's logits after a prefix."""
    return np.random.default_rng([3, *prefix]).normal(0, 1.5, VOCABULARY).astype(np.float32)


def draft_q(*prefix):
    """A drafter's, over the draft ids 0, 2, 3 alone."""
    logits = np.random.default_rng([5, *prefix]).normal(0, 1.5, 3)
    return np.exp(logits) / np.exp(logits).sum()


IDS = np.array([0, 2, 3])


def grown(chooser, shape, tokens, drawn=True):
    """A draft of a static shape (children per node, by level), drawn or chosen."""
    paths, parents, laws, level = [], [], {}, [((), -1)]
    for width in shape:
        below = []
        for path, node in level:
            q = draft_q(*PROMPT, *tokens, *path)
            laws[node] = Law(token_ids=IDS, log_q=np.log(q).astype(np.float32))
            order = chooser.order(0, IDS, laws[node].log_q, width) if drawn else np.argsort(-q)[:width]
            for index in order:
                paths.append((*path, int(IDS[index])))
                parents.append(node)
                below.append((paths[-1], len(paths) - 1))
        level = below
    count = len(paths)
    return Draft(
        token_ids=np.array([path[-1] for path in paths], np.int32), parents=np.array(parents, np.int32),
        log_q=np.zeros(count, np.float32), survival=np.zeros(count, np.float32), laws=laws if drawn else {},
    ), paths


def plain_law(params, length, tokens=()):
    """The target's own law of ``length`` tokens, from the same processors."""
    if len(tokens) == length:
        return {tokens: 1.0}
    law = {}
    from pdspec.sampling import support
    allowed = support(torch.from_numpy(row(*PROMPT, *tokens)), params, History.of(PROMPT, tokens), end_ids=())
    mass = np.exp(allowed.scores.astype(np.float64) - allowed.scores.max())
    for index, chance in enumerate(mass / mass.sum()):
        for rest, weight in plain_law(params, length, (*tokens, allowed.token(index))).items():
            law[rest] = law.get(rest, 0.0) + chance * weight
    return law


def served_law(params, shape, length, drawn):
    """Of the first ``length`` tokens when drafts of ``shape`` are verified until there are as many."""

    def run(chooser):
        tokens = ()
        while len(tokens) < length:
            draft, paths = grown(chooser, shape[: length - len(tokens) - 1], tokens, drawn)
            logits = np.stack([row(*PROMPT, *tokens, *path) for path in [(), *paths]])
            tokens += verify(
                draft, torch.from_numpy(logits), params, History.of(PROMPT, tokens), chooser,
                root_position=len(PROMPT) + len(tokens) - 1, end_ids=(), max_new=length - len(tokens),
            ).verdict.output_ids
        return tokens

    return law_of(outcomes_of(run))


CASES = {
    "plain": {"temperature": 1.0},
    "truncated": {"temperature": 0.7, "top_p": 0.8},
    "penalised": {"temperature": 1.2, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "banned": {"temperature": 1.0, "banned_ids": (2,), "top_k": 2},
}


@pytest.mark.parametrize("verifies", ["rejection", "block"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (3,), (2, 1)], ids=str)
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "chosen"])
@pytest.mark.parametrize("case", CASES)
def test_the_output_law_is_the_targets(case, drawn, shape, verifies):
    params = SamplingParams(verify=verifies, **CASES[case])
    length = len(shape) + 1
    served = served_law(params, shape, length, drawn)
    assert abs(sum(served.values()) - 1) < 1e-12
    assert largest_difference(served, plain_law(params, length)) < 1e-9


def test_a_block_accepts_no_less_than_one_node_at_a_time():
    accepted = {}
    for verifies in ("rejection", "block"):
        params = SamplingParams(temperature=1.0, verify=verifies)

        def run(chooser, params=params):
            draft, paths = grown(chooser, (1, 1, 1), ())
            logits = torch.from_numpy(np.stack([row(*PROMPT, *path) for path in [(), *paths]]))
            return (verify(draft, logits, params, History.of(PROMPT), chooser, root_position=1, end_ids=(),
                           max_new=9).verdict.num_accepted,)

        accepted[verifies] = sum(count * chance for (count,), chance in law_of(outcomes_of(run)).items())
    assert accepted["block"] > accepted["rejection"] + 1e-3


def test_temperature_0_is_the_greedy_walk_whatever_the_rule():
    draft, paths = grown(None, (2, 1), (), drawn=False)
    logits = torch.from_numpy(np.stack([row(*PROMPT, *path) for path in [(), *paths]]))
    found = {
        verify(draft, logits, SamplingParams(verify=rule), History.of(PROMPT), None, root_position=1, end_ids=(),
               max_new=9).verdict
        for rule in ("coupled", "rejection", "block", "greedy")
    }
    assert len(found) == 1 and next(iter(found)).output_ids[0] == int(row(*PROMPT).argmax())


def test_a_stop_token_inside_a_block_ends_the_answer():
    laws = {node: Law(token_ids=np.arange(4), log_q=np.log(np.array([1e-9, 1e-9, 1.0, 1e-9]), dtype=np.float32))
            for node in (-1, 0)}
    draft = Draft(token_ids=np.array([2, 2], np.int32), parents=np.array([-1, 0], np.int32), laws=laws,
                  log_q=np.zeros(2, np.float32), survival=np.zeros(2, np.float32))
    logits = torch.full((3, 4), -30.0)
    logits[:, 2] = 30.0
    params = SamplingParams(temperature=1.0, verify="block", stop_ids=(2,))
    from pdspec.spec.chooser import Seeded
    verdict = verify(draft, logits, params, History.of(PROMPT), Seeded(1, 0), root_position=1, end_ids=(),
                     max_new=9).verdict
    assert (verdict.path, verdict.output_ids) == ((), (2,))
