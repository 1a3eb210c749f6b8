"""Lookahead decoding: its window against the paper's, the rows in the target's forward, and the pool."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError, InvalidRequest
from pdspec.spec.lookahead.drafter import MAX_KEYS, LookaheadDrafter, LookaheadState
from pdspec.spec.lookahead.window import JacobiWindow, most_rows
from pdspec.spec.protocol import Draft, DraftContext, HiddenRows, Verdict
from pdspec.spec.tree import tree_rows
from pdspec.study.audit import forced_logits
from pdspec.types import GenerateRequest, SamplingParams

PROMPT = [5, 9, 2, 7, 5, 1]


def says(tokens) -> int:
    """A toy target: the token after these."""
    return (3 * tokens[-1] + 5 * tokens[-2] + 7 * sum(tokens[-4:]) + 1) % 23


def test_the_window_is_the_paper_s():
    """Section 3.1 written out as a grid: columns of guesses, each seeing level 0 up to itself and its own column."""
    window_size, level = 4, 5
    guesses = [3, 1, 4, 1, 5, 9]  # W + N - 3
    window = JacobiWindow.begin(window_size, level, guesses)
    text = list(PROMPT)
    grid = [dict(enumerate(guesses, 1))]  # level → column → token
    for _ in range(14):
        branch = window.branch()
        # the rows, as contexts, through parents alone
        contexts: list[list[int]] = []
        for token, parent in zip(branch.token_ids.tolist(), branch.parents.tolist(), strict=True):
            contexts.append([*(contexts[parent] if parent >= 0 else text), token])
        columns = sorted(grid[-1])
        expected = {
            (depth, i): [*text, *(grid[0][j] for j in range(1, i + 1)), *(grid[d][i] for d in range(1, depth + 1))]
            for depth in range(len(grid)) for i in grid[depth]
        }
        assert contexts == [expected[depth, i] for depth in range(len(grid)) for i in sorted(grid[depth])]
        assert branch.asked.tolist() == list(range(len(contexts) - len(columns), len(contexts)))
        new = {i: says(expected[len(grid) - 1, i]) for i in columns}
        ngrams = window.advance(text[-1], np.array([says(contexts[row]) for row in branch.asked]))
        if len(grid) < level - 1:
            assert ngrams == []
            grid = [  # the root is one column further, and column 0 of level 0 is the root
                {i - 1: token for i, token in row.items() if i - 1 >= (1 if depth == 0 else 0)}
                for depth, row in enumerate([*grid, new])
            ]
        else:
            assert ngrams == [
                (grid[0].get(i, text[-1]), *(grid[d][i] for d in range(1, level - 1)), new[i])
                for i in range(window_size)
            ]
            grid = [*grid[1:], new]
            del grid[0][0]
        assert [len(row) for row in window.levels] == [len(row) for row in grid]
        text.append(says(text))
    assert len(window.branch().token_ids) == (level - 1) * window_size - 1


@pytest.mark.parametrize("size", [(1, 3), (1, 5), (7, 5), (15, 5), (3, 8)])
def test_no_branch_is_larger_than_stated(size):
    window = JacobiWindow.begin(*size, list(range(sum(size) - 3)))
    rows = []
    for _ in range(2 * size[1]):
        branch = window.branch()
        rows.append(len(branch.token_ids))
        window.advance(0, np.zeros(len(branch.asked), np.int64))
    assert max(rows) == most_rows(*size)
    with pytest.raises(ValueError, match="Jacobi window"):
        window.advance(0, np.zeros(99, np.int64))


def context(tokens=PROMPT, tree="") -> DraftContext:
    return DraftContext(request_id="r", sampling=SamplingParams(), noise_key=(1 << 63, 2), token_ids=list(tokens),
                        pages=[], prompt_len=len(tokens) - 1, tree=tree)


def answer(drafter, ctx, draft: Draft, *outputs: int, path=()) -> None:
    asked = None if draft.branch is None else np.zeros(len(draft.branch.asked), np.int64)
    hidden = HiddenRows(start=ctx.root_position, captured=None, final=None, branch_ids=asked)
    ctx.token_ids += outputs
    drafter.observe([(ctx, Verdict(path=path, output_ids=outputs), hidden)])


def test_the_draft_is_the_tree_of_the_n_grams_that_begin_with_the_root():
    drafter = LookaheadDrafter(window=3, level=4, guesses=3, max_positions=99)
    ctx = context([1, 2, 3, 4, 1, 2, 3, 5, 1, 6, 7, 8, 1, 2, 9, 9, 1])
    (draft,) = drafter.propose([ctx], [99])
    # of the four that were seen the oldest has made room; the latest stands first
    assert draft.token_ids.tolist() == [2, 9, 9, 6, 7, 8, 3, 5]
    assert draft.parents.tolist() == [-1, 0, 1, -1, 3, 4, 0, 6]
    assert draft.survival.tolist() == [0.5, 0.25, 0.125, 0.25, 0.125, 0.0625, 0.0625, 0.03125]
    assert np.isnan(draft.log_q).all() and draft.laws == {}
    assert len(draft.branch.token_ids) == 4
    (chain,) = drafter.propose([context(ctx.token_ids, "chain(2)")], [9])
    assert chain.token_ids.tolist() == [2, 9] and chain.parents.tolist() == [-1, 0]
    (small,) = drafter.propose([ctx], [4])
    assert small.token_ids.tolist() == [2, 9, 9, 6]
    assert drafter.propose([ctx], [0])[0].num_nodes == 0 and drafter.propose([ctx], [0])[0].branch is None


def test_text_may_be_left_out_of_the_pool():
    looping = [1, 2, 3, 1, 2, 3, 1]
    drafters = [LookaheadDrafter(window=2, level=3, guesses=2, text=text, max_positions=99) for text in (True, False)]
    drafts = [drafter.propose([context(looping)], [9])[0] for drafter in drafters]
    assert [draft.num_nodes for draft in drafts] == [2, 0]
    ctx = context(looping)
    for _ in range(6):
        (draft,) = drafters[1].propose([ctx], [9])
        answer(drafters[1], ctx, draft, 1)
    # every n-gram there is ends with what the branch was told
    assert ctx.state.pool and all(ngram[-1] == 0 for known in ctx.state.pool.values() for ngram in known)


def test_the_pool_is_bounded():
    drafter = LookaheadDrafter(window=2, level=3, guesses=2, max_positions=10**6)
    ctx = context([*range(3 * MAX_KEYS), 7, 1, 1, 7, 2, 2, 7, 3, 3, 7])
    drafter.resume(ctx, None, {})
    state: LookaheadState = ctx.state
    assert len(state.pool) == MAX_KEYS and state.pool[7] == [(2, 2), (3, 3)]
    assert 3 * MAX_KEYS - 3 in state.pool and 9 not in state.pool


def test_a_window_waits_where_its_rows_would_leave_the_context():
    drafter = LookaheadDrafter(window=3, level=4, guesses=3, max_positions=11)
    ctx = context()  # the root stands at 5; the deepest row at 9, 10, 11, …
    for there in (True, True, False, False):
        (draft,) = drafter.propose([ctx], [9])
        assert (draft.branch is not None) == there
        if there:
            assert int(tree_rows(draft, 5, ctx.root_position).positions.max()) < 11
        answer(drafter, ctx, draft, 4)


def test_trees_and_options_that_do_not_fit_are_refused():
    drafter = LookaheadDrafter(max_positions=99)
    assert drafter.depth("") == 4 and drafter.depth("chain(3)") == 3
    for tree in ("chain(5)", "static(2x2)", "dynamic(4,4,29)"):
        with pytest.raises(InvalidRequest, match=r"depth in 1\.\.4.*at most 28 nodes"):
            drafter.depth(tree)
    for options, names in (
        ({"lookahead:level": "2"}, "lookahead:level"), ({"lookahead:window": "x"}, "lookahead:window"),
        ({"lookahead:guesses": "64", "lookahead:level": "9"}, "256"), ({"lookahead:text": "maybe"}, "on nor off"),
        ({"lookahead:breadth": "3"}, "lookahead:breadth"),
    ):
        with pytest.raises(ConfigError, match=names):
            LocalGenerator(WorkerConfig(**BASE, options=options))


BASE = {
    "model": "tiny", "dtype": "float32", "threads": 1, "cache_tokens": 4096, "poison": True, "drafter": "lookahead",
    "drafters": ("none", "lookahead"),
}


@pytest.fixture(scope="module")
def local() -> Iterator[LocalGenerator]:
    options = {"lookahead:window": "4", "lookahead:level": "4", "lookahead:guesses": "5", "lookahead:text": "off"}
    local = LocalGenerator(WorkerConfig(**BASE, options=options))
    yield local
    local.resources.close()


def ask(seed, **changes):
    sampling = SamplingParams(**{"max_tokens": 40, "seed": seed, "ignore_eos": True, **changes.pop("sampling", {})})
    ids = tuple((7 * i * i + 11 * seed + i) % 256 for i in range(20 + seed))
    return GenerateRequest(request_id=f"r{seed}", prompt_ids=ids, sampling=sampling, **changes)


def test_what_the_branch_is_told_is_what_a_plain_forward_says(local, monkeypatch):
    """In a batch: of each asked row, the best token after the context that the row stands for."""
    drafter = local.resources.drafters["lookahead"]
    asked: dict[str, tuple[list[int], Draft]] = {}
    checked = 0

    def propose(batch, budgets):
        drafts = LookaheadDrafter.propose(drafter, batch, budgets)
        asked.update((ctx.request_id, (list(ctx.token_ids), d)) for ctx, d in zip(batch, drafts, strict=True))
        return drafts

    def observe(batch):
        nonlocal checked
        for ctx, _, hidden in batch:
            text, draft = asked[ctx.request_id]
            paths: list[list[int]] = []
            for token, parent in zip(draft.branch.token_ids.tolist(), draft.branch.parents.tolist(), strict=True):
                paths.append([*(paths[parent] if parent >= 0 else []), token])
            assert len(hidden.branch_ids) == len(draft.branch.asked)
            for row, token in zip(draft.branch.asked.tolist(), hidden.branch_ids.tolist(), strict=True):
                whole = text + paths[row]
                logits = forced_logits(local.resources, whole, len(whole) - 1, rows=64)
                assert token == int(logits[-1].argmax())
                checked += 1
        LookaheadDrafter.observe(drafter, batch)

    monkeypatch.setattr(drafter, "propose", propose)
    monkeypatch.setattr(drafter, "observe", observe)
    requests = [ask(seed, sampling={"max_tokens": 9, "temperature": 0.7 * seed}) for seed in (0, 1)]
    for _ in local.generate_batch([*requests, ask(2, drafter="none")]):
        pass
    assert checked > 40


def test_guesses_of_its_own_are_accepted_and_change_nothing(local):
    accepted = 0
    for seed in range(4):
        for temperature in (0.0, 0.9):
            sampling = {"temperature": temperature, "max_tokens": 120}
            chunks = list(local.generate(ask(seed, sampling=sampling)))
            plain = list(local.generate(ask(seed, drafter="none", sampling=sampling)))
            one, other = ([token for chunk in many for token in chunk.token_ids] for many in (chunks, plain))
            assert one == other
            accepted += chunks[-1].stats.accepted_tokens
    assert accepted > 0
