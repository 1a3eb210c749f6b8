"""The default model through the real path: answers in bf16 are those of plain decoding in one process, float32 logits
and greedy answers are those of transformers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.model.files import resolve
from pdspec.model.reference import reference_model
from pdspec.model.tokenizer import load_tokenizer
from pdspec.study.audit import forced_logits, judge, transformers_logits
from pdspec.types import GenerateRequest, SamplingParams
from tests.contract.around import channel_to
from tests.parity.roles import Answer, Roles, run_client, running, wait_until

pytestmark = pytest.mark.model
MODEL: dict[str, Any] = {"model": "smollm2-135m", "heads": {}, "cache_tokens": 16384, "threads": 2, "chunk": 32}
QUESTIONS = (
    "Name three things to pack for a day of walking in the hills, and say why each one matters.",
    "A baker sells 14 loaves an hour. How many does she sell in a day of 8 hours? Think step by step.",
    "Write a Python function that counts the vowels in a text, then repeat the function with a docstring.",
)
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}
CASES = [("none", ""), ("ngram", ""), ("eagle3", "chain(4)"), ("eagle3", "dynamic(4,4,8)")]


def asked(sampling: str, tokens: int = 48) -> list[GenerateRequest]:
    tokenizer = load_tokenizer(MODEL["model"])
    return [
        GenerateRequest(
            request_id=f"{sampling}-{number}", drafter="none", trace=True,
            prompt_ids=tuple(tokenizer.apply_chat([{"role": "user", "content": question}])),
            sampling=SamplingParams(max_tokens=tokens, seed=100 + number, ignore_eos=True, **SAMPLING[sampling]),
        )
        for number, question in enumerate(QUESTIONS)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    with running(**MODEL) as roles:
        yield roles


@pytest.fixture(scope="module")
def plain(roles: Roles) -> dict[str, Answer]:
    """Plain decoding in one process, one request at a time."""
    return {one.request_id: roles.ask_local(one) for sampling in SAMPLING for one in asked(sampling)}


def test_bf16_is_exact_here(roles):
    for holder in (roles.prefill.engine.host, roles.decode.engine.host, roles.local):
        assert holder.resources.fingerprint["numerics"].startswith("exact/")


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_every_drafter_behind_the_handoff_writes_what_plain_decoding_writes(roles, plain, mode):
    """All at once, in one batch of mixed drafters, greedy and sampled."""
    many = [
        dataclasses.replace(one, drafter=drafter, tree=tree, draft_prefill=mode)
        for sampling in SAMPLING
        for one in asked(sampling)
        for drafter, tree in CASES
        if mode == "prefill" or drafter == "eagle3"
    ]
    for one, answer in zip(many, roles.ask(*many), strict=True):
        assert answer.tokens == plain[one.request_id].tokens, (one.request_id, one.drafter, one.tree)
        assert answer.stats.draft_rebuilds == answer.stats.prefill_retries == 0
        n, layers = len(one.prompt_ids), 30
        assert answer.stats.kv_bytes == n * layers * 2 * 3 * 64 * 2
        if one.drafter == "eagle3":
            assert answer.stats.draft_kv_bytes == (n * 2 * 3 * 64 * 2 if mode == "prefill" else 0)


def test_the_shipped_head_proposes_behind_the_handoff_what_it_proposes_here_and_helps(roles):
    accepted = verifications = 0
    for one in (dataclasses.replace(one, drafter="eagle3", tree="dynamic(4,4,8)") for one in asked("greedy")):
        (answer,) = roles.ask(one)
        assert answer.traces == roles.ask_local(one).traces
        accepted, verifications = accepted + answer.stats.accepted_tokens, verifications + answer.stats.verifications
    assert 1 + accepted / verifications > 1.3


@pytest.mark.parametrize("alone", [False, True], ids=["handoff", "alone"])
def test_a_client_that_leaves_amid_a_chunk_of_seconds_frees_its_pages_within_one(roles, monkeypatch, alone):
    prompt = tuple((7 * i * i + i) % 40000 for i in range(3000))
    one = GenerateRequest(request_id="left", prompt_ids=prompt, sampling=SamplingParams(max_tokens=20, seed=1))
    route = dataclasses.replace(roles.route(), prefill=()) if alone else roles.route()
    worker = roles.decode if alone else roles.prefill

    async def leave() -> None:
        async with channel_to(roles.decode.address) as channel:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    await Roles.one(channel, one, route)

    for role in (roles.prefill, roles.decode):
        resources = role.engine.host.resources
        monkeypatch.setattr(resources, "config", resources.config.replace(chunk=1024))
    monkeypatch.setattr(roles.prefill.engine.host.scheduler, "chunk", 1024)
    before = worker.engine.host.resources.pool.free
    run_client(leave())
    assert wait_until(lambda: roles.held() == 0) and worker.engine.host.resources.pool.free == before


@pytest.fixture(scope="module")
def single() -> Iterator[LocalGenerator]:
    config = WorkerConfig(**{**MODEL, "dtype": "float32", "drafters": ("none",), "drafter": "none"})
    generator = LocalGenerator(config)
    yield generator
    generator.resources.pool.check_integrity([])
    generator.resources.close()


def test_float32_logits_and_greedy_answers_are_those_of_transformers(single):
    model = reference_model(resolve(MODEL["model"]), "float32")
    for one in asked("greedy", tokens=32):
        tokens = [token for chunk in single.generate(one) for token in chunk.token_ids]
        theirs = transformers_logits(model, one.prompt_ids, tokens)
        ours = forced_logits(single.resources, [*one.prompt_ids, *tokens[:-1]], len(one.prompt_ids) - 1, rows=64)
        assert float((ours - theirs).abs().max()) < 1e-3
        audit = judge(theirs, one, tokens, single.resources.end_ids, tau=1e-3)
        assert audit.positions == 32 and audit.unaudited == 0
        if audit.ties == 0:
            with torch.inference_mode():
                ids = torch.tensor([one.prompt_ids])
                written = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
            ending = next((i for i, token in enumerate(tokens) if token in single.resources.end_ids), 32)
            assert tokens[:ending] == written.tolist()[:ending]
