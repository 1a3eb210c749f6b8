"""The two engine steps in one process: what prefill tells and when, what a draft is cut to, what the statistics count,
and that pages come back however a generation ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator, new_context
from pdspec.engine.outlook import shallow
from pdspec.engine.prefill import PrefillEngine, PrefillSequence, page_table
from pdspec.engine.resources import Resources, check_fingerprint, load
from pdspec.engine.selftest import first_difference
from pdspec.errors import ConfigError, Incompatible, Overloaded, PdspecError, UnknownName
from pdspec.spec.protocol import Draft
from pdspec.types import DraftPrefill, FinishReason, GenerateRequest, SamplingParams

CONFIG = WorkerConfig(model="tiny", heads={"eagle3": "random:0"}, cache_tokens=2048, threads=1, chunk=8, poison=True)
PROMPT = tuple(range(30, 51))


@pytest.fixture(scope="module")
def shared() -> Iterator[Resources]:
    resources = load(CONFIG)
    yield resources
    resources.close()


@pytest.fixture
def resources(shared: Resources) -> Iterator[Resources]:
    yield shared
    shared.pool.check_integrity([])


def ask(drafter: str = "eagle3", ids: tuple[int, ...] = PROMPT, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 20, "seed": 1, "ignore_eos": True, **sampling})
    return GenerateRequest(request_id="r", prompt_ids=ids, drafter=drafter, sampling=params)


class Told:
    """Events as they come."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.events.append((name, *values))

    def names(self) -> list[str]:
        """Kinds in order, without repeats in a row."""
        kinds = [event[0] for event in self.events]
        return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]

    def covered(self, group: str, layer: int) -> list[int]:
        """Rows of one layer in the order told."""
        return [r for e in self.events if e[:3] == ("rows", group, layer) for r in range(e[3], e[4])]


def prefill(resources: Resources, request: GenerateRequest, mode: DraftPrefill, chunk: int = 8) -> Told:
    pages, told = resources.pool.allocate(8), Told()
    try:
        sequence = PrefillSequence(
            request=request, ctx=new_context(resources, request, pages), drafter=resources.drafter(request.drafter),
            draft_prefill=mode, events=told, ship_rows=request.sampling.max_tokens > 1,
        )  # fmt: skip
        engine = PrefillEngine(resources)
        while not sequence.finished:
            engine.step([(sequence, min(chunk, sequence.remaining))])
        assert sequence.remaining == 0
    finally:
        resources.pool.release(pages)
    return told


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_each_row_of_each_layer_is_told_once_in_order_and_done_comes_last(resources, chunk):
    told = prefill(resources, ask(), DraftPrefill.PREFILL, chunk)
    for layer in range(4):
        assert told.covered("target", layer) == list(range(21))
    assert told.covered("draft/eagle3", 0) == list(range(21))
    assert told.names()[-3:] == ["rows", "start", "done"]
    assert [event[0] for event in told.events].count("first") == 1


def test_the_first_token_is_told_before_any_draft_row_that_reads_it(resources):
    told = prefill(resources, ask(), DraftPrefill.PREFILL)
    first = next(i for i, event in enumerate(told.events) if event[0] == "first")
    last_row = next(i for i, e in enumerate(told.events) if e[:2] == ("rows", "draft/eagle3") and e[4] == 21)
    assert first < last_row
    layers = [event[2] for event in told.events[:4]]
    assert layers == [0, 1, 2, 3]  # while the chunk is computed, layer by layer


def test_with_the_draft_prefill_elsewhere_hidden_rows_go_out_instead(resources):
    told = prefill(resources, ask(), DraftPrefill.DECODE)
    hidden = [event[1] for event in told.events if event[0] == "hidden"]
    assert [rows.start for rows in hidden] == [0, 8, 16] and [len(rows.captured) for rows in hidden] == [8, 8, 5]
    assert not told.covered("draft/eagle3", 0) and "start" not in told.names()
    assert "hidden" not in prefill(resources, ask("none"), DraftPrefill.DECODE).names()


@pytest.mark.parametrize("sampling", [{"max_tokens": 1}, {"max_tokens": 9, "stop_ids": tuple(range(256))}])
def test_a_first_token_that_ends_the_answer_starts_no_drafter(resources, sampling):
    told = prefill(resources, ask(**sampling), DraftPrefill.PREFILL, 64)
    assert told.names()[-2:] == ["first", "done"] and "start" not in told.names()
    assert ("rows" in told.names()) == (sampling["max_tokens"] > 1)


def test_a_step_of_abandoned_prompts_ends_after_the_layer_at_hand(resources):
    """A long chunk must not keep the pages of a client that has left; a prompt beside it is still served."""
    pages, told = resources.pool.allocate(16), [Told(), Told()]
    sequences = [
        PrefillSequence(
            request=ask(), ctx=new_context(resources, ask(), pages[8 * i : 8 * i + 8]), events=told[i],
            drafter=resources.drafter("eagle3"), draft_prefill=DraftPrefill.PREFILL,
        )
        for i in range(2)
    ]  # fmt: skip
    engine = PrefillEngine(resources)
    sequences[0].abandoned = True
    engine.step([(sequences[0], 8)])
    assert engine.steps == 1 and sequences[0].num_computed == 0 and not told[0].events
    engine.step([(sequences[0], 8), (sequences[1], 8)])
    assert engine.steps == 5 and sequences[1].num_computed == 8
    resources.pool.release(pages)


# --- drafts and statistics -------------------------------------------------------------------------------------------


def draft(parents: list[int]) -> Draft:
    size = len(parents)
    return Draft(
        token_ids=np.arange(10, 10 + size, dtype=np.int32), parents=np.array(parents, np.int32),
        log_q=np.zeros(size, np.float32), survival=np.ones(size, np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "ids", "parents"),
    [
        (9, [10, 11, 12, 13, 14], [-1, -1, 0, 1, 2]),
        (2, [10, 11, 12, 13], [-1, -1, 0, 1]),
        (1, [10, 11], [-1, -1]),
        (0, [], []),
    ],
)
def test_a_draft_is_cut_to_the_depth_that_the_answer_can_use(depth, ids, parents):
    cut = shallow(draft([-1, -1, 0, 1, 2]), depth)
    assert cut.token_ids.tolist() == ids and cut.parents.tolist() == parents
    assert len(cut.log_q) == len(cut.survival) == len(ids)


@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix", "eagle3"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 20])
def test_statistics_add_up_and_an_answer_ends_at_its_last_token(resources, drafter, tokens):
    chunks = list(LocalGenerator(resources=resources).generate(ask(drafter, max_tokens=tokens)))
    stats, out = chunks[-1].stats, [token for chunk in chunks for token in chunk.token_ids]
    assert stats is not None and all(chunk.stats is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is FinishReason.LENGTH and len(out) == stats.output_tokens == tokens
    assert (
        stats.verifications == len(chunks) - 1
        and stats.output_tokens == 1 + stats.verifications + stats.accepted_tokens
    )
    assert sum(stats.accepted_per_position) == stats.accepted_tokens <= stats.drafted_tokens
    pairs = zip(stats.accepted_per_position, stats.reached_per_position, strict=True)
    assert all(accepted <= reached for accepted, reached in pairs)
    if drafter == "none" or tokens <= 2:
        assert stats.drafted_tokens == 0


def test_a_stop_id_inside_an_accepted_path_ends_the_answer_there(resources):
    whole = [t for c in LocalGenerator(resources=resources).generate(ask("none")) for t in c.token_ids]
    stop = whole[9]
    for drafter in ("none", "ngram", "suffix", "eagle3"):
        chunks = list(LocalGenerator(resources=resources).generate(ask(drafter, stop_ids=(stop,))))
        assert [t for c in chunks for t in c.token_ids] == whole[: whole.index(stop) + 1]
        assert chunks[-1].finish_reason is FinishReason.STOP and chunks[-1].stop_match == str(stop)


def test_pages_come_back_when_a_generation_is_abandoned_refused_or_too_long(resources):
    generator = LocalGenerator(resources=resources)
    running = generator.generate(ask())
    next(running), next(running)
    assert resources.pool.held > 0
    running.close()
    assert resources.pool.held == 0
    with pytest.raises(UnknownName):
        list(generator.generate_batch([ask(), ask("nobody")]))
    with pytest.raises(Overloaded):
        list(generator.generate_batch([ask(max_tokens=1500), ask(max_tokens=1500)]))
    assert resources.pool.held == 0


# --- resources -------------------------------------------------------------------------------------------------------


def test_the_self_test_proves_row_invariance_here_and_takes_no_pages(resources):
    free = resources.pool.free
    assert first_difference(resources) == "" and resources.pool.free == free
    assert resources.metrics["numerics_exact"] == 1.0


def test_exact_is_refused_where_it_cannot_be_proven(monkeypatch):
    monkeypatch.setattr("pdspec.engine.selftest.first_difference", lambda resources: "row 3 differs")
    with pytest.raises(ConfigError, match="row 3 differs"):
        load(CONFIG.replace(numerics="exact"))
    resources = load(CONFIG.replace(numerics="auto"))
    assert resources.fingerprint["numerics"] == "fast" and resources.metrics["numerics_exact"] == 0.0
    resources.close()


def test_fingerprints_are_compared_field_by_field_for_the_drafter_asked_for():
    mine = {"target": "a", "tokenizer": "b", "numerics": "exact/1", "drafter/eagle3": "e"}
    check_fingerprint(mine, {**mine, "drafter/eagle3": "other"}, drafter="none", peer="P")
    for field in mine:
        with pytest.raises(Incompatible, match="this worker has .*, P has other") as caught:
            check_fingerprint(mine, {**mine, field: "other"}, drafter="eagle3", peer="P")
        assert caught.value.field == f"fingerprint.{field}"
        with pytest.raises(Incompatible, match="P has absent"):
            check_fingerprint(mine, {k: v for k, v in mine.items() if k != field}, drafter="eagle3", peer="P")


def test_a_tree_is_the_requests_the_deployments_or_the_familys(resources):
    eagle, none = resources.drafter("eagle3"), resources.drafter("none")
    assert resources.tree(eagle, "chain(2)") == "chain(2)" and resources.tree(eagle, "") == eagle.default_tree
    assert resources.tree(none, "chain(2)") == ""


def test_an_engine_refuses_a_request_without_a_seed(resources):
    with pytest.raises(PdspecError, match="without a seed"):
        list(LocalGenerator(resources=resources).generate(ask(seed=None)))


def test_page_tables_are_padded():
    assert page_table([[4, 2], [7], []]).tolist() == [[4, 2], [7, -1], [-1, -1]]
