"""Accept, reject, abort, in any order and at random: no page is lost, no row of another answer or of a rejected node is
ever read, and every answer is plain decoding's.

The runner is a fake that keeps in each KV row which token stands at which position, and checks on every forward that
the rows a query may see spell exactly the tokens before it. Rows behind the committed ones are poisoned."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decode_worker.retraction import rank
from decode_worker.scheduler import DecodeScheduler
from pdspec.cache.paged import PagedCache
from pdspec.cache.parked import ParkedRows, park_rows, unpark_rows
from pdspec.cache.pool import PagePool, pages_for
from pdspec.config import WorkerConfig
from pdspec.engine.decode import DecodeEngine
from pdspec.engine.sequence import DecodeSequence
from pdspec.model.batch import ForwardBatch, ForwardOutput
from pdspec.sampling import History, choose
from pdspec.spec.protocol import Draft, DraftContext, Verdict
from pdspec.types import CacheGroup, GenerateRequest, SamplingParams

VOCABULARY, PAGE, PAGES = 5, 4, 40
SCRATCH = 11  # of chain(8): see DecodeEngine.scratch_rows, and the root's row
TARGET = CacheGroup(name="target", num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
PARAMS = (SamplingParams(), SamplingParams(temperature=1.0, repetition_penalty=1.4),
          SamplingParams(temperature=0.8, top_p=0.9))


@lru_cache(maxsize=100_000)
def scores(tokens: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(tokens).normal(0, 1.5, VOCABULARY).astype(np.float32))


class SpellingRunner:
    """KV row = (token, position)."""

    group = TARGET

    def forward(self, batch: ForwardBatch, cache: PagedCache) -> ForwardOutput:
        rows = flat(cache)
        pages = batch.page_table[batch.sequence]
        own = pages[np.arange(batch.num_rows), batch.slots // PAGE] * PAGE + batch.slots % PAGE
        rows[own] = np.stack([batch.token_ids, batch.positions], 1)  # before any is read, as in a layer
        logits = []
        for row in range(batch.num_rows):
            path = batch.ancestors[row]
            visible = np.concatenate([np.arange(batch.prefix_len[row]), path[path >= 0]])
            assert (pages[row][visible // PAGE] >= 0).all()
            seen = rows[pages[row][visible // PAGE] * PAGE + visible % PAGE]
            assert seen[:, 1].tolist() == list(range(int(batch.positions[row]) + 1)), "rows of other positions, or NaN"
            logits.append(scores(tuple(seen[:, 0].astype(int).tolist())))
        return ForwardOutput(logits=torch.stack(logits))


def flat(cache: PagedCache) -> np.ndarray:
    """[pages * rows, 2]"""
    return cache.group("target")[0].view(-1, 2).numpy()


class RandomDrafter:
    """Trees of any shape, half of them with plain decoding's path inside."""

    name, groups, capture, want_final, max_nodes, default_tree = "random", (), (), False, 8, "chain(8)"

    def __init__(self) -> None:
        self.random = random.Random(1)
        self.observed = 0

    def rows_at(self, num_tokens: int) -> dict[str, int]:
        return {}

    def propose(self, batch: list[DraftContext], budgets: list[int]) -> list[Draft]:
        return [self._tree(ctx, budget) for ctx, budget in zip(batch, budgets, strict=True)]

    def observe(self, batch: list[tuple[DraftContext, Verdict, Any]]) -> None:
        self.observed += sum(verdict.num_accepted for _, verdict, _ in batch)

    def _tree(self, ctx: DraftContext, budget: int) -> Draft:
        expected = ctx.state[len(ctx.token_ids) :]
        nodes: list[tuple[int, ...]] = [()]
        path = [tuple(expected[: depth + 1]) for depth in range(min(4, len(expected)))]
        for _ in range(self.random.randrange(budget + 1)):
            known = path and self.random.random() < 0.5
            node = path.pop(0) if known else (*self.random.choice(nodes), self.random.randrange(VOCABULARY))
            if node not in nodes and node[:-1] in nodes:
                nodes.append(node)
        unknown = np.full(len(nodes) - 1, np.nan, np.float32)
        return Draft(
            token_ids=np.array([node[-1] for node in nodes[1:]], np.int32), log_q=unknown, survival=unknown,
            parents=np.array([nodes.index(node[:-1]) - 1 for node in nodes[1:]], np.int32),
        )


@dataclass(eq=False)
class Item:
    """A reservation; its sequence once it is running."""

    request: GenerateRequest
    num_pages: int
    expected: list[int]
    pages: list[int] = field(default_factory=list)
    sequence: DecodeSequence | None = None
    priority: int = 0
    number: int = -1
    paused: bool = False
    parked: ParkedRows | None = None
    steps: int = 0

    @property
    def first_pages(self) -> int:
        return min(self.num_pages, pages_for(len(self.request.prompt_ids) + SCRATCH, PAGE))

    @property
    def step_pages(self) -> int:
        assert self.sequence is not None
        return min(self.num_pages, pages_for(self.sequence.num_rows + SCRATCH, PAGE))

    def retraction_s(self) -> float:
        return float(len(self.pages))

    def grant(self) -> None:
        pass


class Shelf:
    """Keeps what is retracted."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache

    def park(self, item: Item) -> None:
        assert item.sequence is not None
        item.parked = park_rows(self.cache, item.pages, {TARGET.name: item.sequence.num_rows})
        self.cache.poison(None, item.pages, 0, len(item.pages) * PAGE)

    def unpark(self, item: Item) -> bool:
        self.cache.poison(None, item.pages, 0, len(item.pages) * PAGE)
        unpark_rows(self.cache, item.pages, item.parked)
        item.parked = None
        return True


class Resources:
    """As much of ``engine.resources.Resources`` as decoding needs."""

    def __init__(self, pages: int) -> None:
        self.config = WorkerConfig(model="tiny", poison=True, page_size=PAGE)
        self.runner, self.cache = SpellingRunner(), PagedCache((TARGET,), pages, PAGE)
        self.pool, self.drafters, self.end_ids = PagePool(pages, PAGE), {"random": RandomDrafter()}, ()


class World:
    """A decode worker without its sockets."""

    def __init__(self, overcommit: float = 1.0, pages: int = PAGES) -> None:
        self.resources = Resources(pages)
        self.engine = DecodeEngine(self.resources)  # type: ignore[arg-type]
        self.scheduler: DecodeScheduler[Item] = DecodeScheduler(
            self.resources.pool, max_batch=5, overcommit=overcommit, keeper=Shelf(self.resources.cache)
        )
        self.count = self.finished = 0
        self.longer = 4 if overcommit > 1 else 1  # answers

    def add(self, number: int) -> None:
        self.count += 1
        ids = tuple((self.count * 7 + i * i) % VOCABULARY for i in range(1 + number % 9))
        params = PARAMS[number % len(PARAMS)]
        tokens = (2 + number % 11) * self.longer
        drafter = self.resources.drafters["random"]
        request = GenerateRequest(
            request_id=str(self.count), prompt_ids=ids, drafter="random", tree="chain(8)",
            sampling=SamplingParams(**{**vars(params), "seed": self.count, "max_tokens": tokens}),
        )
        rows = self.engine.rows_needed(request, drafter, request.tree)
        self.scheduler.add(Item(request, pages_for(rows, PAGE), plain(request)))

    def land(self, number: int) -> None:
        """A prefill ends."""
        if not self.scheduler.granted:
            return
        item = self.scheduler.granted[number % len(self.scheduler.granted)]
        request, rows = item.request, flat(self.resources.cache)
        for slot, token in enumerate(request.prompt_ids):
            rows[item.pages[slot // PAGE] * PAGE + slot % PAGE] = token, slot
        first = item.expected[len(request.prompt_ids)]
        ctx = DraftContext(
            request_id=request.request_id, sampling=request.sampling, noise_key=(request.sampling.seed or 0, 0),
            token_ids=[*request.prompt_ids, first], pages=item.pages, prompt_len=len(request.prompt_ids),
            tree=request.tree, state=item.expected,
        )
        item.sequence = DecodeSequence(
            request=request, ctx=ctx, drafter=self.resources.drafters["random"],
            history=History.of(request.prompt_ids, [first]),
        )
        self.scheduler.join(item)

    def step(self) -> None:
        running = self.scheduler.make_room()
        if not running:
            assert (not self.scheduler.running and not self.scheduler.retracted) or self.scheduler.granted
            return
        assert min(self.scheduler.running + self.scheduler.retracted, key=rank) in running  # the first one advances
        self.engine.step([item.sequence for item in running if item.sequence])
        for item in running:
            assert item.sequence is not None
            tokens = item.sequence.ctx.token_ids
            assert tokens == item.expected[: len(tokens)]
            if item.sequence.finish is not None:
                assert len(tokens) == len(item.expected)
                self.finished += 1
                self.scheduler.release(item)

    def abort(self, number: int) -> None:
        every = [*self.scheduler.waiting, *self.scheduler.admitted()]
        if every:
            item = every[number % len(every)]
            self.scheduler.release(item)
            assert not item.pages


def plain(request: GenerateRequest) -> list[int]:
    """Prompt and plain decoding's answer."""
    tokens, params = list(request.prompt_ids), request.sampling
    while len(tokens) < len(request.prompt_ids) + params.max_tokens:
        history = History.of(request.prompt_ids, tokens[len(request.prompt_ids) :])
        tokens.append(choose(scores(tuple(tokens)), params, history, seed=params.seed or 0, sample=0,
                             position=len(tokens), end_ids=()))
    return tokens


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "land", "step", "step", "step", "abort"]), st.integers(0, 98)),
    min_size=200, max_size=200,
)
DONE: Counter[str] = Counter()


SETTINGS: dict[str, Any] = {
    "deadline": None, "database": None, "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
}  # fmt: skip


@settings(max_examples=50, **SETTINGS)
@given(ACTIONS)
def ten_thousand(actions):
    many(World(), actions)


@settings(max_examples=15, **SETTINGS)
@given(ACTIONS)
def three_thousand_in_a_pool_promised_twice(actions):
    many(World(overcommit=4.0, pages=18), actions)


def many(world: World, actions: list[tuple[str, int]]) -> None:
    for number in range(4):
        world.add(number)
    for what, number in actions:
        if what == "step":
            world.step()
        else:
            getattr(world, what)(number)
        world.scheduler.check_integrity()
        DONE["actions"] += 1
    while world.scheduler.waiting or world.scheduler.admitted():
        world.land(0)
        world.step()
        world.scheduler.check_integrity()
    assert world.resources.pool.held == 0
    DONE["finished"] += world.finished
    DONE["accepted"] += world.resources.drafters["random"].observed
    DONE["retracted"] += world.scheduler.retractions


def test_ten_thousand_random_steps_lose_no_page_and_read_no_rejected_row():
    DONE.clear()
    ten_thousand()
    assert DONE["actions"] >= 10_000 and DONE["finished"] > 100 and DONE["accepted"] > 100, DONE
    assert DONE["retracted"] == 0


def test_pages_taken_and_given_back_change_no_token_and_all_answers_end():
    DONE.clear()
    three_thousand_in_a_pool_promised_twice()
    assert DONE["actions"] >= 3_000 and DONE["finished"] > 100 and DONE["retracted"] > 100, DONE


def test_the_fake_runner_notices_a_row_that_was_not_compacted(monkeypatch):
    monkeypatch.setattr(PagedCache, "copy_rows", lambda *_: None)
    with pytest.raises(AssertionError):
        many_steps()


def test_the_fake_runner_notices_a_row_that_is_read_after_its_rejection(monkeypatch):
    """As if a rejected node's row were taken for a committed one: the poison is seen."""
    rows = DecodeSequence.num_rows.fget
    monkeypatch.setattr(DecodeSequence, "num_rows", property(lambda self: rows(self) + (self.verifications == 2)))
    with pytest.raises(AssertionError, match="or NaN"):
        many_steps()


def many_steps() -> None:
    world = World()
    for number in range(40):
        world.add(number + 7)
        world.land(0)
        world.step()
