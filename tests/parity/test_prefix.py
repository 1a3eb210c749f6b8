"""Prefix caches on both sides of the handoff: the same tokens, proposals and accepted counts as without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import pytest

from pdspec.config import RouterConfig
from pdspec.types import GenerateRequest, Handoff, Route
from pdspec.wire.channels import make_channel
from router import relay
from tests.parity.roles import EVERY, WITH_MEMORY, Answer, Roles, request, run_client, running

CASES = [
    ("none", ""),
    ("ngram", "chain(4)"),
    ("lookahead", "chain(3)"),
    ("medusa", "static(3x2x1)"),
    ("eagle1", "chain(3)"),
    ("eagle2", "dynamic(4,4,8)"),
    ("eagle3", "dynamic(4,4,8)"),
    ("mtp", "static(2x2x1)"),
    ("draft_model", "chain(4)"),
    ("sparse", "static(2x2)"),
    ("combined", "dynamic(4,4,8)"),
]
SAMPLED = {"temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module")
def roles() -> Iterator[Roles]:
    sizes = {"prefill": {"page_size": 16, "chunk": 8}, "decode": {"page_size": 8}}
    with running(dtype="float32", prefix_cache="all", **sizes, **EVERY) as roles:
        yield roles


@pytest.fixture(scope="module")
def passing():
    started = relay.launch(RouterConfig(port=0))
    yield started
    started.stop()


def next_turn(asked: GenerateRequest, answer: Sequence[int], *more: int) -> GenerateRequest:
    """The conversation so far, and what the user says next."""
    return dataclasses.replace(asked, prompt_ids=(*asked.prompt_ids, *answer, *more))


def check(roles: Roles, asked: GenerateRequest, answer: Answer) -> None:
    local = roles.ask_local(asked)
    assert answer.tokens == local.tokens
    assert answer.logprobs == local.logprobs
    assert answer.traces == local.traces or asked.drafter in WITH_MEMORY
    assert answer.stats.draft_rebuilds == 0


@pytest.mark.parametrize(("drafter", "tree"), CASES)
def test_a_conversation_is_the_same_and_moves_only_what_is_new(roles, passing, drafter, tree):
    """Three turns through each handoff and draft prefill in turns; the last one forgets half of an answer, as clients
    do that strip what a model thought."""
    index = CASES.index((drafter, tree))
    mode = "decode" if index % 2 else "prefill"
    for handoff in Handoff:
        route = roles.route(handoff=handoff, relay=passing.address if handoff is Handoff.RELAY else "")
        mode = "prefill" if mode == "decode" else "decode"
        seed = 100 + index + 50 * (handoff is Handoff.RELAY)
        asked = request(drafter, tree, n=30 + index % 9, seed=seed, sampling=SAMPLED, draft_prefill=mode)
        reach = 0  # rows that the turn before has left
        for turn in range(3):
            (answer,) = roles.ask(asked, route=route)
            check(roles, asked, answer)
            n, group = len(asked.prompt_ids), roles.local.resources.runner.group
            if turn:
                assert answer.stats.cached_tokens >= reach - 16 and answer.stats.prefill_cached_tokens > 0
            new = n - answer.stats.cached_tokens
            assert answer.stats.kv_bytes == new * group.row_bytes * group.num_layers
            kept = answer.tokens if turn == 0 else answer.tokens[:19]
            asked, reach = next_turn(asked, kept, *range(7)), n + len(kept)


@pytest.mark.parametrize("drafter", ["eagle3", "mtp"])
def test_whoever_goes_on_otherwise_gets_draft_rows_of_its_own(roles, drafter):
    """Requests share a beginning that ends with a page, and differ in the very next token, which its last draft rows
    read: each must draft as if it were alone, in both orders, and so must those that go on with either."""
    for mode in ("prefill", "decode"):
        start = request(drafter, "", n=64, seed=300 + (mode == "decode"), draft_prefill=mode)
        ways = [dataclasses.replace(start, prompt_ids=(*start.prompt_ids[:48], *more)) for more in
                ([5] * 9, [6] * 9, [5] * 30, [6] * 30, [5] * 9, [7], [6] * 31)]  # fmt: skip
        for asked in ways:
            (answer,) = roles.ask(asked)
            check(roles, asked, answer)
        assert answer.stats.cached_tokens >= 72


def test_samples_of_one_prompt_share_its_pages(roles):
    """They come at once: the first fetches the prompt, the others wait for it and fetch what stands behind it."""
    for drafter, n in (("eagle3", 45), ("mtp", 48)):
        prompt = request(drafter, n=n, seed=400, sampling=SAMPLED)
        samples = [dataclasses.replace(prompt, request_id=f"s{index}", sample=index) for index in range(4)]
        answers = roles.ask(*samples)
        for asked, answer in zip(samples, answers, strict=True):
            check(roles, asked, answer)
        cached = sorted(answer.stats.cached_tokens for answer in answers)
        assert cached[0] == 0 and cached[1] >= 40, cached
        assert sorted(answer.stats.prefill_cached_tokens for answer in answers)[1] >= 31


def test_another_salt_shares_nothing_and_another_drafter_shares_what_it_can_read(roles):
    asked = request("eagle3", n=50, seed=500)
    roles.ask(asked)
    (salted,) = roles.ask(dataclasses.replace(asked, cache_salt="tenant"))
    assert salted.stats.cached_tokens == salted.stats.prefill_cached_tokens == 0
    (plain,) = roles.ask(dataclasses.replace(asked, drafter="none"))
    assert plain.stats.cached_tokens == 48
    (other,) = roles.ask(dataclasses.replace(asked, drafter="eagle1"))
    assert other.stats.cached_tokens == 0
    for one, answer in ((asked, salted), (dataclasses.replace(asked, drafter="eagle1"), other)):
        check(roles, one, answer)


@pytest.mark.parametrize("drafter", ["eagle3", "mtp", "draft_model"])
def test_a_decode_worker_that_prefills_itself_uses_its_cache(roles, drafter):
    alone = Route(decode=roles.decode.address, prefill=(), handoff=Handoff.DIRECT)
    asked = request(drafter, n=41, seed=600, sampling=SAMPLED)
    for route in (roles.route(), alone, alone):
        (answer,) = roles.ask(asked, route=route)
        check(roles, asked, answer)
        asked = next_turn(asked, answer.tokens, *range(5))
    assert answer.stats.cached_tokens > 100 and answer.stats.kv_bytes == 0


def test_a_tiny_pool_evicts_and_stays_right():
    """Room for one answer and a little more: every request throws out what others left."""
    with running(dtype="float32", drafters=("none", "eagle3"), num_pages=22, page_size=8, prefix_cache="auto") as roles:
        asks = [request(drafter, n=40 + 3 * i, seed=i % 2, sampling={"max_tokens": 24})
                for i, drafter in enumerate(("eagle3", "none", "eagle3", "eagle3", "none", "eagle3"))]  # fmt: skip
        for asked in asks:
            (answer,) = roles.ask(asked)
            check(roles, asked, answer)
        for asked, answer in zip(asks, roles.ask(*asks), strict=True):
            check(roles, asked, answer)
        assert roles.decode.engine.host.prefixes.counts()["prefix_evictions"] > 0


def test_what_is_damaged_or_left_is_not_kept():
    """Damaged frames, rebuilt draft state and clients that leave: the answers after them are right all the same."""
    faulty = {"frame_faults": {"flip": 0.05, "drop": 0.01}, "chunk": 8}
    with running(dtype="float32", prefix_cache="auto", prefill=faulty, decode={"on_prefill_failure": "local"}) as roles:
        asked, rebuilt = request("eagle3", n=37, seed=9, sampling=SAMPLED), 0
        for turn in range(6):
            run_client(leave(roles, asked))
            (answer,) = roles.ask(asked)
            local = roles.ask_local(asked)
            assert answer.tokens == local.tokens and answer.traces == local.traces
            rebuilt += answer.stats.draft_rebuilds + answer.stats.prefill_retries
            asked = next_turn(asked, answer.tokens, turn) if turn % 3 else request("eagle3", n=50, seed=turn)
        assert rebuilt > 0


async def leave(roles: Roles, asked: GenerateRequest) -> None:
    """A client that goes away after some tokens."""
    channel = make_channel(roles.decode.address)
    await roles.one(channel, asked, roles.route(), stop_after=9)
    await channel.close()


@pytest.mark.parametrize("mode", ["off", "prompt"])
def test_caches_can_be_off_or_keep_prompts_alone(mode):
    with running(dtype="float32", drafters=("none", "eagle3"), prefix_cache=mode) as roles:
        asked = request("eagle3", n=45, seed=1)
        (answer,) = roles.ask(asked)
        asked = next_turn(asked, answer.tokens, 1, 2, 3)
        (answer,) = roles.ask(asked)
        check(roles, asked, answer)
        assert answer.stats.cached_tokens == (0 if mode == "off" else 32)


def test_a_short_rest_is_computed_where_the_cache_is():
    """The decode worker has the answer's KV, which no prefill worker has: it computes what the user adds."""
    mtp = {"drafter": "mtp", "drafters": ("none", "mtp"), "heads": {"mtp": "random:0"}}
    with running(dtype="float32", prefix_cache="auto", decode={"local_prefill": 32}, **mtp) as roles:
        asked = request("mtp", n=45, seed=2)
        for turn in range(3):
            (answer,) = roles.ask(asked)
            check(roles, asked, answer)
            assert answer.stats.handoff == ("none" if turn else "direct") and (answer.stats.kv_bytes == 0) == bool(turn)
            asked = next_turn(asked, answer.tokens, 1, 2, 3)


@pytest.mark.parametrize("budget", ["fixed", "goodput"])
def test_cached_rows_are_those_of_a_prefill_to_the_bit(budget):
    """Target and draft KV that a decode worker keeps of an answer, against a prefill of the same tokens."""
    heads = dict.fromkeys(("eagle3", "mtp"), "random:0")
    names = {"drafter": "mtp", "drafters": ("none", *heads), "heads": heads}
    with running(dtype="float32", prefix_cache="auto", decode={"budget": budget}, **names) as roles:
        for drafter in ("eagle3", "mtp"):
            asked = request(drafter, n=37, seed=5, sampling={"max_tokens": 60})
            (answer,) = roles.ask(asked)
            whole, held = next_turn(asked, answer.tokens), []
            local, there = roles.local.resources, roles.decode.engine.host
            sequence, _ = roles.local.begin(whole, held)
            found = roles.decode.engine.post(lambda host=there, one=whole: cached_pages(host, one)).result(10)
            rows = len(found) * local.pool.page_size
            assert rows >= (80 if budget == "fixed" else 32)
            due = {local.runner.group.name: rows, **sequence.drafter.rows_at(rows - 1)}
            for group, count in due.items():
                for layer in range(local.cache.layout(group).num_layers):
                    mine = local.cache.read_rows(group, layer, sequence.ctx.pages, 0, count)
                    assert there.resources.cache.read_rows(group, layer, found, 0, count) == mine, (drafter, group)
            local.pool.release(held[0])


def cached_pages(host, asked: GenerateRequest) -> list[int]:
    prefix = host.prefixes.begin(asked, host.resources.drafter(asked.drafter))
    size = host.resources.pool.page_size
    keys = prefix.keys.first(asked.prompt_ids, len(asked.prompt_ids) // size)
    return [one.page for one in host.prefixes.index.find(keys, asked.prompt_ids, prefix.groups)]
