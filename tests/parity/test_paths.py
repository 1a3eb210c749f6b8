"""The paths that an answer may take, all to the same tokens: a dense recompute by transformers, direct and relayed
handoffs between pages of other sizes, the router with text on both ends, and a move to another decode worker."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch

import decode_worker.service
from pdspec.client import Answer as Collected
from pdspec.client import Piece, RouterClient, collect
from pdspec.config import RouterConfig, WorkerConfig
from pdspec.model.files import resolve
from pdspec.model.reference import reference_model
from pdspec.model.tokenizer import load_tokenizer
from pdspec.study.audit import forced_logits, judge, transformers_logits
from pdspec.types import GenerateRequest, Handoff, SamplingParams, UserRequest
from router import relay, service
from tests.parity.roles import EVERY, TINY, WITH_MEMORY, Roles, held_by, request, running, wait_until

CASES = [
    ("none", ""),
    ("ngram", "chain(4)"),
    ("lookahead", "chain(3)"),
    ("medusa", "static(3x2x1)"),
    ("eagle1", "chain(3)"),
    ("eagle2", "dynamic(4,4,8)"),
    ("eagle3", "chain(3)"),
    ("eagle3", "dynamic(4,4,8)"),
    ("eagle3", "static(3x2)"),
    ("mtp", "static(2x2x1)"),
    ("draft_model", "chain(4)"),
    ("sparse", "static(2x2)"),
    ("combined", "dynamic(4,4,8)"),
]
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
EVERYTHING = {
    "temperature": 1.1, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.3, "presence_penalty": 0.4,
    "frequency_penalty": 0.2, "logit_bias": ((7, 2.0), (9, -3.0)), "banned_ids": (11, 12), "min_tokens": 5,
    "logprobs": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    """Large pages travel into small ones (the other way round is tested in test_same_tokens)."""
    sizes = {"prefill": {"page_size": 16, "chunk": 8}, "decode": {"page_size": 8}}
    with running(dtype="float32", **sizes, **EVERY) as roles:
        yield roles


@pytest.fixture(scope="module")
def passing() -> Iterator[Any]:
    started = relay.launch(RouterConfig(port=0))
    yield started
    started.stop()


@pytest.mark.parametrize("sampling", [{}, SAMPLED, EVERYTHING], ids=["greedy", "sampled", "everything"])
def test_paged_decoding_is_a_dense_recompute_by_other_code(roles, sampling):
    """Every token is the best by log p + g of logits that transformers computes without any cache."""
    model = reference_model(resolve("tiny"), "float32")
    for seed in range(3):
        asked = request("none", n=30 + 7 * seed, seed=seed, sampling=sampling)
        answer = roles.ask_local(asked)
        logits = transformers_logits(model, asked.prompt_ids, answer.tokens)
        audit = judge(logits, asked, answer.tokens, roles.local.resources.end_ids, tau=1e-3)
        assert audit.positions == 40 and audit.unaudited == 0
        if not sampling:
            assert answer.tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("handoff", "sampling"),
    [(Handoff.DIRECT, {}), (Handoff.RELAY, SAMPLED), (Handoff.DIRECT, EVERYTHING), (Handoff.RELAY, EVERYTHING)],
    ids=["direct-greedy", "relay-sampled", "direct-everything", "relay-everything"],
)
def test_both_handoffs_give_plain_decodings_tokens_and_the_local_proposals(roles, passing, handoff, sampling):
    route = roles.route(handoff=handoff, relay=passing.address if handoff is Handoff.RELAY else "")
    asked = [
        request(drafter, tree, n=20 + 11 * i, seed=7 * i, sampling=sampling, draft_prefill=mode)
        for i, (drafter, tree) in enumerate(CASES)
        for mode in ("prefill", "decode")
    ]
    for one, answer in zip(asked, roles.ask(*asked, route=route), strict=True):
        plain = roles.ask_local(dataclasses.replace(one, drafter="none", tree=""))
        local = roles.ask_local(one)
        assert answer.tokens == local.tokens == plain.tokens
        assert answer.logprobs == local.logprobs == plain.logprobs and bool(answer.logprobs) == ("logprobs" in sampling)
        assert answer.traces == local.traces or one.drafter in WITH_MEMORY
        assert answer.stats.handoff == handoff.value and answer.stats.draft_rebuilds == 0


def test_a_batch_in_one_process_is_as_one_at_a_time(roles):
    many = [
        request(*one, n=5 + 13 * i, seed=i, sampling={"temperature": 0.6 * (i % 2)}) for i, one in enumerate(CASES)
    ]
    together: list[list[int]] = [[] for _ in many]
    for index, chunk in roles.local.generate_batch(many):
        together[index] += chunk.token_ids
    assert together == [roles.ask_local(one).tokens for one in many]


def test_samples_of_one_prompt_differ_by_their_index_alone(roles):
    samples = [dataclasses.replace(request(sampling=SAMPLED), sample=index) for index in range(3)]
    answers = roles.ask(*samples)
    assert [answer.tokens for answer in answers] == [roles.ask_local(one).tokens for one in samples]
    assert len({tuple(answer.tokens) for answer in answers}) == 3


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 17])
def test_prompts_around_the_edges_of_chunks_and_pages(roles, n):
    for drafter, mode in product(("eagle3", "mtp", "draft_model", "sparse"), ("prefill", "decode")):
        asked = request(drafter, "dynamic(3,3,6)", n=n, seed=n, sampling={"max_tokens": 20}, draft_prefill=mode)
        (answer,) = roles.ask(asked)
        local = roles.ask_local(asked)
        assert (answer.tokens, answer.traces) == (local.tokens, local.traces)
        assert answer.stats.draft_rebuilds == 0


@pytest.mark.parametrize("drafter", ["eagle3", "draft_model", "sparse"])
def test_an_answer_may_fill_the_context_to_its_last_row(roles, drafter):
    asked = request(drafter, "dynamic(4,4,8)", n=2000, sampling={"max_tokens": 48, **SAMPLED})
    (answer,) = roles.ask(asked)
    assert len(answer.tokens) == 48
    assert answer.tokens == roles.ask_local(dataclasses.replace(asked, drafter="none", tree="")).tokens


# --- through the router ----------------------------------------------------------------------------------------------


@contextmanager
def routed(roles: Roles, *more: str, relay_address: str = "") -> Iterator[RouterClient]:
    config = RouterConfig(
        port=0, model="tiny", heartbeat_s=0.1, relay=relay_address, prefill=(roles.prefill.address,),
        decode=(roles.decode.address, *more),
    )  # fmt: skip
    started = service.launch(config)
    try:
        with RouterClient(started.address) as client:
            client.wait_ready(workers=2 + len(more))
            yield client
    finally:
        started.stop()


def local_tokens(roles: Roles, ids: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
    return tuple(
        roles.ask_local(GenerateRequest(request_id="l", prompt_ids=ids, drafter="none", sampling=sampling)).tokens
    )


def test_text_in_and_text_out_through_router_and_both_handoffs(roles, passing):
    tokenizer = load_tokenizer("tiny")
    inputs = {
        "text": ({"text": "Once upon a time"}, tuple(tokenizer.encode("Once upon a time"))),
        "chat": ({"chat": (("user", "Hi!"),)}, tuple(tokenizer.apply_chat([{"role": "user", "content": "Hi!"}]))),
    }
    with routed(roles, relay_address=passing.address) as client:
        for given, ids in inputs.values():
            for handoff in Handoff:
                for drafter, tree in CASES:
                    params = SamplingParams(max_tokens=24, seed=5, ignore_eos=True, **SAMPLED)
                    user = UserRequest(**given, sampling=params, drafter=drafter, tree=tree, handoff=handoff.value)
                    answer = client.generate(user)
                    assert answer.token_ids == local_tokens(roles, ids, params)
                    assert answer.text == tokenizer.decode(list(answer.token_ids)) and answer.seed == 5
                    assert answer.finish_reason == "length" and answer.stats.prompt_tokens == len(ids)
                    assert answer.stats.handoff == handoff.value and answer.stats.kv_bytes > 0


def test_a_drawn_seed_is_returned_and_repeats_the_answer(roles):
    with routed(roles) as client:
        user = UserRequest(text="seed", sampling=SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True))
        first = client.generate(user)
        again = client.generate(
            dataclasses.replace(user, drafter="none", sampling=dataclasses.replace(user.sampling, seed=first.seed))
        )
        assert first.seed and again.token_ids == first.token_ids
        assert client.generate(user).token_ids != first.token_ids


@pytest.mark.parametrize("after", [8, 100])
def test_a_decode_worker_that_dies_in_mid_answer_is_replaced_and_no_token_is_lost(roles, after):
    """The router replays prompt and answer on another worker: same tokens, each once."""
    params = SamplingParams(max_tokens=300, seed=4, temperature=0.8, repetition_penalty=1.1, ignore_eos=True)
    dying = decode_worker.service.launch(WorkerConfig(**{**TINY, "dtype": "float32", "worker_id": "dying"}))
    try:
        with routed(roles, dying.address) as client:
            expected = local_tokens(roles, tuple(b"moving"), params)
            answers: dict[int, Collected] = {}
            pieces = threading.Semaphore(0)  # of all lanes together

            def counted(stream: Iterator[Piece]) -> Iterator[Piece]:
                for piece in stream:
                    pieces.release()
                    yield piece

            def ask(lane: int) -> None:
                user = UserRequest(prompt_ids=tuple(b"moving"), sampling=params, drafter="eagle3", tree="chain(2)")
                with RouterClient(client.endpoint) as own:
                    answers[lane] = collect(counted(own.stream(user)))

            lanes = [threading.Thread(target=ask, args=(lane,)) for lane in range(4)]
            for lane in lanes:
                lane.start()
            assert all(pieces.acquire(timeout=20) for _ in range(after)) and held_by(dying) > 0
            assert wait_until(lambda: dying.engine.host.decode.steps >= 3)  # not all pieces are another worker's
            dying.stop()
            for lane in lanes:
                lane.join(60)
            assert [answers[lane].token_ids for lane in range(4)] == [expected] * 4
            assert sum(answer.stats.moves for answer in answers.values()) >= 1
    finally:
        dying.stop()


def test_dense_and_paged_logits_agree(roles):
    """Prefill rows of the packed forward against transformers, over pages in any order."""
    tokens = list(request(n=150).prompt_ids)
    ours = forced_logits(roles.local.resources, tokens, 0, rows=37)
    with torch.inference_mode():
        theirs = reference_model(resolve("tiny"), "float32")(torch.tensor([tokens])).logits[0]
    assert float((ours - theirs).abs().max()) < 1e-3
