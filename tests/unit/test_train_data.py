"""Stores survive being cut; the generator resumes to the same samples; prompt files are read or refused by line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pdspec.errors import ConfigError
from pdspec.prompts import Prompt, load_prompts
from pdspec.study.prompts import study_prompts
from pdspec.train.data import Generator, Target, generate, load_target
from pdspec.train.draw import sample_tokens
from pdspec.train.examples import ExampleReader, hidden_rows
from pdspec.train.plan import SELF, DataConfig, plan
from pdspec.train.store import Sample, TokenStore
from pdspec.train.vocab import answer_counts, coverage, draft_vocabulary

PROMPTS = tuple(Prompt(id=str(n), category="", text=f"count to {n * 37}") for n in range(14))


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("tiny-5", dtype="bfloat16", threads=1)


def data_config(out: Path, **changes: object) -> DataConfig:
    config = DataConfig(
        out=out, tokens=60, sources=(("file", PROMPTS),), self_share=0.0, max_answer=9, batch=3, keep_hidden=True
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def sample(index: int, length: int = 6) -> Sample:
    tokens = np.arange(length, dtype=np.int32) + index
    hidden = np.full((length, 4, 8), index, np.uint16)
    return Sample(
        index=index, source="s", prompt_tokens=2, key=f"k{index}", tokens=tokens, best=tokens + 1, hidden=hidden
    )


def by_index(store: TokenStore) -> dict[int, Sample]:
    return {one.index: one for one in store.read_all()}


def assert_same(a: Sample, b: Sample) -> None:
    assert (a.source, a.prompt_tokens, a.key) == (b.source, b.prompt_tokens, b.key)
    assert a.hidden is not None and b.hidden is not None
    for left, right in ((a.tokens, b.tokens), (a.best, b.best), (a.hidden, b.hidden)):
        assert np.array_equal(left, right)


def test_a_store_cut_anywhere_opens_with_its_whole_samples(tmp_path: Path) -> None:
    meta = {"hidden_row": [4, 8]}
    store = TokenStore(tmp_path, meta)
    store.append(sample(0))
    store.append(sample(1, 5))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    store.append(sample(2))
    index = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(index[: sizes["samples.jsonl"] + 9])  # killed within the third line
    cut = TokenStore(tmp_path, meta)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == sizes
    assert len(cut) == 2 and cut.indices == {0, 1} and cut.answer_tokens() == {"s": 7}
    cut.append(sample(3))
    again = TokenStore(tmp_path)
    for number, expected in ((0, sample(0)), (1, sample(1, 5)), (2, sample(3))):
        assert_same(again.read(number), expected)


def test_a_store_refuses_other_settings_and_lost_bytes(tmp_path: Path) -> None:
    TokenStore(tmp_path, {"seed": 1}).append(replace(sample(0), hidden=None))
    with pytest.raises(ConfigError, match="seed=1, not 2"):
        TokenStore(tmp_path, {"seed": 2})
    with (tmp_path / "tokens.i32").open("r+b") as file:
        file.truncate(8)
    with pytest.raises(ConfigError, match=r"tokens\.i32 has 8 bytes, 24 expected"):
        TokenStore(tmp_path, {"seed": 1})


def test_interrupted_generation_writes_the_same_samples(tmp_path: Path, target: Target) -> None:
    whole = by_index(generate(data_config(tmp_path / "whole"), target, show=False))
    config = data_config(tmp_path / "cut", batch=2)  # neighbours differ too
    generator = Generator(config, target)
    store = TokenStore(config.out, generator.meta())
    for count, one in enumerate(generator.run(store.indices, store.keys)):
        store.append(one)
        if count == 2:
            break
    resumed = by_index(generate(config, target, show=False))
    both = whole.keys() & resumed.keys()
    assert len(both) >= 5
    for index in both:
        assert_same(whole[index], resumed[index])
    assert sum(len(s.tokens) - s.prompt_tokens for s in resumed.values()) >= 60


def test_stored_hidden_rows_are_those_of_one_prefill(tmp_path: Path, target: Target) -> None:
    store = generate(data_config(tmp_path, tokens=20), target, show=False)
    one = ExampleReader([store], 64, 1.0).example(0)
    again = hidden_rows(target, store.read(0).tokens)
    assert torch.equal(one.hidden, again.to(torch.bfloat16).float())
    weight = target.runner.ops.linear(again[one.prompt_tokens - 1 : -1, -1].contiguous(), target.runner.lm_head)
    assert torch.equal(weight.argmax(-1), one.best[one.prompt_tokens - 1 : -1])
    assert bool((one.best[: one.prompt_tokens - 1] == -1).all()) and int(one.best[-1]) == -1


def test_repeated_prompts_are_dropped(tmp_path: Path, target: Target) -> None:
    twice = (PROMPTS[0], replace(PROMPTS[1], text="  COUNT to   0 "), PROMPTS[2])
    store = generate(data_config(tmp_path, sources=(("file", twice),), tokens=1000), target, show=False)
    assert len(store) == 2 == len(store.keys)


def test_a_model_that_asks_nothing_is_given_up(tmp_path: Path, target: Target) -> None:
    config = data_config(tmp_path, sources=(), self_share=1.0, max_user=1, batch=64, tokens=10_000_000)
    with pytest.raises(ConfigError, match="self_share.*in a row"):
        generate(config, target, show=False)


def test_the_plan_mixes_by_share_and_goes_on_alone(tmp_path: Path) -> None:
    mixed = plan(data_config(tmp_path, self_share=0.6))
    items = [next(mixed) for _ in range(60)]
    assert [item.index for item in items] == list(range(60))
    assert sum(item.source == SELF for item in items[:20]) == 12
    assert sorted(item.prompt.id for item in items if item.prompt) == sorted(p.id for p in PROMPTS)
    assert len(list(plan(data_config(tmp_path)))) == len(PROMPTS)


def test_sampling_follows_the_softmax_and_its_limits() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(4000, 1)
    uniform = ((np.arange(4000) + 0.5) / 4000).tolist()
    for temperature, floor in ((0.7, 0.0), (1.0, 0.3)):
        p = torch.softmax(logits[0] / temperature, -1)
        p = torch.where(p >= floor * p.max(), p, 0.0)
        ids, best = sample_tokens(logits.clone(), [temperature] * 4000, [floor] * 4000, uniform)
        found = np.bincount(ids, minlength=4) / 4000
        assert np.abs(found - (p / p.sum()).numpy()).max() < 1e-3 and set(best) == {2}
    assert set(sample_tokens(logits[:3].clone(), [0.0] * 3, [0.0] * 3, [0.0, 0.5, 0.999])[0]) == {2}


def test_answers_end_where_the_context_does(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.tokenizer, "eos_ids", ())
    limit = target.runner.config.max_context
    config = data_config(tmp_path, sources=(("file", PROMPTS[:1]),), tokens=limit, max_answer=2 * limit)
    (one,) = generate(config, target, show=False).read_all()
    assert len(one.tokens) == limit


@pytest.mark.parametrize("size", [200, 256])
def test_drawing_from_many_ids_follows_the_running_sum(size: int) -> None:
    logits = 3 * torch.randn(64, size, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 1e-12])
    running = logits.double().softmax(-1).cumsum(-1)
    wanted = torch.searchsorted(running / running[:, -1:], uniform[:, None], right=True)[:, 0]
    ids, best = sample_tokens(logits.clone(), [1.0] * 64, [0.0] * 64, uniform.tolist())
    away = (torch.from_numpy(ids) != wanted).sum()
    assert away <= 1 and ids.max() < size  # the last one stands at the very end, where float32 has its say
    assert (torch.from_numpy(best) == logits.argmax(-1)).all()


def test_the_draft_vocabulary_holds_what_answers_hold_most() -> None:
    one = Sample(
        index=0,
        source="",
        prompt_tokens=2,
        key="",
        best=np.zeros(7, np.int32),
        tokens=np.array([9, 9, 3, 3, 5, 1, 3], np.int32),
    )
    counts = answer_counts([one], 12)
    ids = draft_vocabulary(counts, 3)
    assert ids.tolist() == [1, 3, 5] and coverage(counts, ids) == 1.0
    assert coverage(counts, draft_vocabulary(counts, 1)) == pytest.approx(0.6)


def test_prompt_files_in_all_forms_and_bad_lines(tmp_path: Path) -> None:
    records = [
        {"id": "a", "category": "chat", "prompt": "x"},
        {"question_id": 81, "category": "w", "turns": ["y", "z"]},
        {"question": "q", "answer": "r"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    assert [(p.id, p.category, p.text) for p in load_prompts(path)] == [
        ("a", "chat", "x"),
        ("81", "w", "y"),
        ("p-3", "", "q"),
    ]
    for line, message in (
        ("{", "p.jsonl:4"),
        ('{"prompt": ""}', "p.jsonl:4: no prompt"),
        ('{"id": "a", "prompt": "k"}', "'a'"),
    ):
        path.write_text("\n".join(map(json.dumps, records)) + "\n" + line, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_prompts(path)


def test_the_example_prompts_have_every_category() -> None:
    prompts = study_prompts()
    counts = {category: sum(p.category == category for p in prompts) for category in {p.category for p in prompts}}
    assert len(prompts) >= 60 and len(counts) == 6 and min(counts.values()) >= 10
    assert len({" ".join(p.text.lower().split()) for p in prompts}) == len(prompts)
    assert {p.category for p in study_prompts(limit=12)} == set(counts)
