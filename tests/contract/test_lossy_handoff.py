"""``wire_kv: int8``: every path lands the very rows that one process would make of its own by rounding them, both sides
must agree on it, and it is called lossy wherever one looks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import grpc
import pytest

import decode_worker
import prefill_worker
from pdspec.config import RouterConfig
from pdspec.errors import PdspecError
from pdspec.transfer.lossy import decode, encode, encoded_bytes
from pdspec.types import Handoff
from router import relay
from tests.contract.around import check_clean, status_of, stopping, worker
from tests.contract.tampering import DRAFT, TARGET, cut, flip, once, tampered
from tests.parity.roles import Answer, Roles, request, run_client, running, take

LOSSY = {"wire_kv": "int8"}
PATHS = ("grpc", "shm", "relay")
SAMPLED = {"max_tokens": 32, "temperature": 0.8}


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[str, Roles]]:
    with running(decode={"mover": "grpc"}, **LOSSY) as plain, worker(decode_worker, mover="shm", **LOSSY) as memory:
        yield {"grpc": plain, "shm": Roles(plain.prefill, memory, plain.local)}


@pytest.fixture
def paths(shared: dict[str, Roles]) -> Iterator[dict[str, Roles]]:
    yield shared
    for roles in shared.values():
        check_clean(roles)


def ask(paths: dict[str, Roles], path: str, asked) -> Answer:
    roles = paths.get(path, paths["grpc"])
    if path != "relay":
        return roles.ask(asked)[0]
    with stopping(relay.launch(RouterConfig(port=0))) as passing:
        return roles.ask(asked, route=roles.route(handoff=Handoff.RELAY, relay=passing.address))[0]


def rounded_here(roles: Roles, asked) -> Answer:
    """The answer of one process whose prompt rows were rounded between prefill and decode."""
    local, held, answer = roles.local, [], Answer()
    resources, group = local.resources, local.resources.runner.group
    sequence, chunk = local.begin(asked, held)
    take(answer, chunk)
    count = len(asked.prompt_ids)
    for layer in range(group.num_layers):
        views = resources.cache.row_views(group.name, layer, held[0], 0, count)
        rows = decode(encode(views, group, 0, count), group, 0, count, group.num_kv_heads)
        resources.cache.write_rows(group.name, layer, held[0], 0, count, rows)
    while sequence.finish is None:
        ((_, result),) = local.decode.step([sequence])
        assert not isinstance(result, PdspecError)
        take(answer, result)
    resources.pool.release(held[0])
    return answer


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_lands_what_rounding_here_would_make(paths, path, mode):
    asked = request("eagle3", "chain(3)", n=45, sampling=SAMPLED, draft_prefill=mode)
    roles = paths["grpc"]
    answer, expected = ask(paths, path, asked), rounded_here(roles, asked)
    assert (answer.tokens, answer.traces) == (expected.tokens, expected.traces)
    group = roles.local.resources.runner.group
    parts = sum(encoded_bytes(group, start, min(16, 45 - start), group.num_kv_heads) for start in (0, 16, 32))
    assert answer.stats.kv_bytes == group.num_layers * parts < 0.6 * 45 * group.num_layers * group.row_bytes
    assert answer.stats.prefill_retries == answer.stats.draft_rebuilds == 0
    if mode == "prefill":
        draft = roles.local.resources.cache.layout("draft/eagle3")
        assert answer.stats.draft_kv_bytes == 45 * draft.num_layers * draft.row_bytes, "draft KV is not rounded"


@pytest.mark.parametrize("path", PATHS)
def test_against_the_rounded_prompt_the_drafter_changes_nothing(paths, path):
    """Lossless speculation on lossy KV: all drafters agree with each other, and here not with the model itself."""
    told = {name: ask(paths, path, request(name, n=60, seed=11, sampling=SAMPLED)).tokens
            for name in ("none", "ngram", "eagle3")}  # fmt: skip
    assert told["none"] == told["ngram"] == told["eagle3"]


def test_rounding_is_seen_in_the_scores(paths):
    asked = request("none", n=60, seed=4, sampling={"max_tokens": 8, "logprobs": 0})
    roles = paths["grpc"]
    lossy, whole = ask(paths, "grpc", asked), roles.ask_local(asked)
    pairs = [(a.logprob, b.logprob) for a, b in zip(lossy.logprobs, whole.logprobs, strict=True)]
    assert pairs[0][0] == pairs[0][1], "the first token is the prefill worker's, from whole KV"
    assert any(a != b for a, b in pairs[1:]), "no score moved: nothing was rounded"


def test_both_sides_must_agree_and_a_refusal_names_the_key(paths):
    roles = paths["grpc"]
    with worker(prefill_worker) as whole, worker(decode_worker) as other:
        for decode_side, prefill_side in ((roles.decode, whole), (other, roles.prefill)):
            mixed = Roles(prefill_side, decode_side, roles.local)
            error = status_of(mixed, request(), mixed.route())
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "fingerprint.wire_kv" in error.details() and "int8/16" in error.details()
        assert whole.service.info().fingerprint != roles.prefill.service.info().fingerprint
        assert whole.service.info().metrics["wire_kv_lossy"] == 0
    assert roles.decode.service.info().metrics["wire_kv_lossy"] == 1
    assert roles.decode.service.info().metrics["numerics_exact"] == 0


def test_metrics_call_the_bytes_lossy(paths):
    roles = paths["grpc"]
    kinds = {"target_kv_lossy_int8", "target_kv"}
    before = {kind: moved(roles, kind) for kind in kinds}
    answer = ask(paths, "grpc", request("none", n=40))
    assert moved(roles, "target_kv_lossy_int8") - (before["target_kv_lossy_int8"] or 0) == answer.stats.kv_bytes
    assert moved(roles, "target_kv") is None


def moved(roles: Roles, kind: str) -> float | None:
    return roles.decode.metrics.registry.get_sample_value("pdspec_transfer_bytes_total", {"kind": kind})


@pytest.mark.parametrize("damage", [flip, cut])
def test_damage_to_what_travels_is_found(paths, damage):
    roles, asked = paths["grpc"], request("eagle3", n=45)
    expected = rounded_here(roles, asked)

    async def scenario() -> Answer:
        async with tampered(roles.prefill.address, lambda: once(TARGET, damage), sign=False) as evil:
            (answer,) = await roles._ask([asked], roles.route(evil, roles.prefill.address))
            return answer

    answer = run_client(scenario())
    assert answer.tokens == expected.tokens and answer.stats.prefill_retries == 1


def test_draft_state_is_rebuilt_from_the_prompt_whatever_first_token_that_would_choose(paths):
    """The client has the first token from whole KV; the rebuild may begin behind rounded rows."""
    with running(prefix_cache="auto", **LOSSY) as roles:
        roles.ask(request("eagle3", n=64, sampling=SAMPLED))
        longer = request("eagle3", n=90, sampling=SAMPLED)

        async def scenario() -> Answer:
            async with tampered(roles.prefill.address, lambda: once(DRAFT, flip, 0), sign=False) as evil:
                (answer,) = await roles._ask([longer], roles.route(evil))
                return answer

        answer = run_client(scenario())
        assert answer.stats.draft_rebuilds == 1 and answer.stats.cached_tokens == 64
        short = dataclasses.replace(longer.sampling, max_tokens=1)
        whole = roles.ask_local(dataclasses.replace(longer, sampling=short))
        assert answer.tokens[0] == whole.tokens[0] and len(answer.tokens) == 32
