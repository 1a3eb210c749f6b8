import numpy as np
import pytest
import torch

from pdspec.sampling import History, choose, support, token_logprob
from pdspec.spec.chooser import Seeded
from pdspec.spec.protocol import Draft, empty_draft
from pdspec.spec.verify import verify
from pdspec.types import SamplingParams

VOCABULARY = 6
PROMPT = (1, 4, 2)


def toy_logits(prefix: tuple[int, ...]) -> np.ndarray:
    """A toy target: logits that depend on the whole prefix."""
    return np.random.default_rng([7, *prefix]).normal(0, 2, VOCABULARY).astype(np.float32)


class Toy:
    """The toy target with its rows remembered."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, ...], np.ndarray] = {}

    def row(self, prefix: tuple[int, ...]) -> np.ndarray:
        if prefix not in self.rows:
            self.rows[prefix] = toy_logits(prefix)
        return self.rows[prefix]

    def plain(self, params: SamplingParams, seed: int, length: int) -> list[int]:
        """One token at a time, without any draft."""
        tokens: list[int] = []
        for _ in range(length):
            tokens.append(choose(
                torch.from_numpy(self.row((*PROMPT, *tokens))), params, History.of(PROMPT, tokens),
                seed=seed, sample=0, position=len(PROMPT) + len(tokens), end_ids=(),
            ))
        return tokens

    def logits(self, tokens: list[int], draft: Draft) -> torch.Tensor:
        """Rows of the root and of every node."""
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(draft.token_ids.tolist(), draft.parents.tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        return torch.from_numpy(np.stack([self.row((*PROMPT, *tokens, *path)) for path in [(), *paths]]))


def tree(*nodes: tuple[int, int]) -> Draft:
    """A draft from (token, parent) pairs."""
    tokens, parents = (np.array(column, np.int32) for column in zip(*nodes, strict=True))
    unknown = np.full(len(nodes), np.nan, np.float32)
    return Draft(token_ids=tokens, parents=parents, log_q=unknown, survival=unknown)


def random_tree(rng: np.random.Generator, size: int) -> Draft:
    nodes: list[tuple[int, int]] = []
    while len(nodes) < size:
        node = (int(rng.integers(VOCABULARY)), int(rng.integers(-1, len(nodes))))
        if node not in nodes:
            nodes.append(node)
    return tree(*nodes) if nodes else empty_draft()


GREEDY = SamplingParams()


def run(logits, draft, params=GREEDY, *, history=None, seed=0, end_ids=(), max_new=99, logprobs=None):
    return verify(
        draft, logits, params, history or History.of(PROMPT), Seeded(seed, 0), root_position=len(PROMPT) - 1,
        end_ids=end_ids, max_new=max_new, logprobs=logprobs,
    )


PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.3, top_k=3, repetition_penalty=1.4, presence_penalty=0.3),
    SamplingParams(temperature=0.9, frequency_penalty=1.5, min_p=0.05, banned_ids=(3,)),
    SamplingParams(repetition_penalty=1.8),
]


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: f"T={params.temperature}")
def test_any_tree_yields_the_tokens_of_plain_decoding(params):
    toy, length, accepted = Toy(), 8, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        expected = toy.plain(params, seed, length)
        tokens: list[int] = []
        while len(tokens) < length:
            draft = random_tree(rng, int(rng.integers(0, 9)))
            result = verify(
                draft, toy.logits(tokens, draft), params, History.of(PROMPT, tokens), Seeded(seed, 0),
                root_position=len(PROMPT) + len(tokens) - 1, end_ids=(), max_new=length - len(tokens),
            ).verdict
            assert len(result.output_ids) == len(result.path) + 1
            assert draft.token_ids[list(result.path)].tolist() == list(result.output_ids[:-1])
            parents = draft.parents[list(result.path)].tolist()
            assert parents == [-1, *result.path][: len(parents)]
            accepted += result.num_accepted
            tokens.extend(result.output_ids)
        assert tokens == expected, seed
    assert accepted > 100  # the trees did foresee something


def greedy_rows(*winners: int) -> torch.Tensor:
    """Rows whose argmax is given."""
    rows = torch.zeros(len(winners), VOCABULARY)
    rows[range(len(winners)), list(winners)] = 5.0
    return rows


def test_words_recovered_and_bonus():
    chain = tree((1, -1), (2, 0))
    assert run(greedy_rows(1, 2, 3), chain).verdict.output_ids == (1, 2, 3)  # all accepted, and a bonus
    recovered = run(greedy_rows(1, 5, 3), chain).verdict
    assert (recovered.path, recovered.output_ids, recovered.num_accepted) == ((0,), (1, 5), 1)
    assert run(greedy_rows(4), empty_draft()).verdict.output_ids == (4,)


def test_siblings_and_a_deeper_branch():
    draft = tree((1, -1), (2, -1), (3, 0), (3, 1), (0, 3))
    verdict = run(greedy_rows(2, 0, 3, 0, 0, 4), draft).verdict
    assert (verdict.path, verdict.output_ids) == ((1, 3, 4), (2, 3, 0, 4))


@pytest.mark.parametrize(("params", "end_ids", "output"), [
    (SamplingParams(), (2,), (1, 2)),
    (SamplingParams(stop_ids=(1,)), (), (1,)),
    (SamplingParams(ignore_eos=True), (2,), (1, 2, 3)),
    (SamplingParams(ignore_eos=True, stop_ids=(2,)), (1,), (1, 2)),
])
def test_nothing_follows_an_end(params, end_ids, output):
    verdict = run(greedy_rows(1, 2, 3), tree((1, -1), (2, 0)), params, end_ids=end_ids).verdict
    assert verdict.output_ids == output
    assert len(verdict.path) == len(output) - 1


def test_min_tokens_counts_the_path():
    params = SamplingParams(min_tokens=2)
    rows = greedy_rows(5, 5, 5)
    rows[:, 1] = 1.0  # the second choice
    verdict = run(rows, tree((1, -1), (1, 0)), params, end_ids=(5,)).verdict
    assert verdict.output_ids == (1, 1, 5)


@pytest.mark.parametrize("max_new", [1, 2, 3])
def test_never_more_than_max_new(max_new):
    verdict = run(greedy_rows(1, 2, 3), tree((1, -1), (2, 0)), max_new=max_new).verdict
    assert verdict.output_ids == (1, 2, 3)[:max_new]


def test_logprobs_are_those_of_each_position():
    toy, params = Toy(), SamplingParams(temperature=0.8, repetition_penalty=1.3)
    first, second = toy.plain(params, 3, 2)
    draft = tree((first, -1), (second, 0))
    result = run(toy.logits([], draft), draft, params, seed=3, logprobs=2)
    assert len(result.logprobs) == 3
    for i, report in enumerate(result.logprobs):
        before = result.verdict.output_ids[:i]
        row = torch.from_numpy(toy.row((*PROMPT, *before)))
        allowed = support(row, params, History.of(PROMPT, before), end_ids=())
        assert report == token_logprob(allowed, result.verdict.output_ids[i], 2)
    assert run(toy.logits([], draft), draft, params, seed=3).logprobs == ()


def test_rows_that_the_walk_does_not_visit_are_not_read():
    rows = greedy_rows(1, 2, 3)
    rows[1] = torch.nan
    assert run(rows, tree((4, -1), (2, 0))).verdict.output_ids == (1,)


@pytest.mark.parametrize(("draft", "rows", "message"), [
    (tree((1, -1), (2, 0)), 2, "2 logit rows for a draft of 2 nodes"),
    (tree((1, -1), (1, -1)), 3, "same child"),
    (tree((1, 1), (2, -1)), 3, "before its parent"),
])
def test_malformed_drafts(draft, rows, message):
    with pytest.raises(ValueError, match=message):
        run(torch.zeros(rows, VOCABULARY), draft)
    with pytest.raises(ValueError, match="max_new=0"):
        run(torch.zeros(1, VOCABULARY), empty_draft(), max_new=0)
