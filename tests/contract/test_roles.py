"""What may go wrong between the roles: nothing stays allocated, nothing damaged is used, nobody is left waiting."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest

import decode_worker.service
import prefill_worker.service
from pdspec.config import WorkerConfig
from pdspec.wire.channels import make_channel
from tests.parity.roles import TINY, Roles, request, run_client, running, wait_until


@pytest.fixture(scope="module")
def roles():
    with running() as roles:
        yield roles


def ask_and_leave(roles: Roles, asked, after: float | int) -> None:
    """Cancel after some tokens (int) or seconds (float)."""

    async def main() -> None:
        channel = make_channel(roles.decode.address)
        if isinstance(after, int):
            await Roles.one(channel, asked, roles.route(), stop_after=after)
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(Roles.one(channel, asked, roles.route()), after)
        await channel.close()

    run_client(main())


def test_a_client_that_leaves_while_decoding_frees_every_page_within_a_second(roles):
    ask_and_leave(roles, request(sampling={"max_tokens": 1500}), 5)
    assert wait_until(lambda: roles.held() == 0)


def test_a_client_that_leaves_during_prefill_frees_every_page_within_a_second():
    with running(prefill={"chunk": 1}) as roles:
        ask_and_leave(roles, request(n=1800), 0.2)
        assert wait_until(lambda: roles.held() == 0)


def status_of(roles: Roles, asked, route=None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        roles.ask(asked, route=route)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"prompt_ids": ()}, grpc.StatusCode.INVALID_ARGUMENT, "prompt_ids"),
        ({"prompt_ids": (5, 999999)}, grpc.StatusCode.INVALID_ARGUMENT, "prompt_ids"),
        ({"drafter": "nobody"}, grpc.StatusCode.NOT_FOUND, "drafter"),
        ({"tree": "pyramid(3)"}, grpc.StatusCode.NOT_FOUND, "tree"),
        ({"drafter": "ngram", "tree": "dynamic(3,3,6)"}, grpc.StatusCode.INVALID_ARGUMENT, "tree"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(roles, changes, code, field):
    error = status_of(roles, dataclasses.replace(request(), **changes))
    assert error.code() is code and field in error.details()
    assert roles.held() == 0


OTHERS = [
    ({"model": "tiny-1"}, "target"),
    ({"dtype": "float32"}, "target"),
    ({"heads": {"eagle3": "random:9"}}, "drafter/eagle3"),
    ({"options": {"eagle3:first_token_padding": "true"}}, "drafter/eagle3"),
]


@pytest.mark.parametrize(("changes", "field"), OTHERS)
def test_a_prefill_worker_that_holds_other_things_is_refused_naming_the_field(roles, changes, field):
    other = prefill_worker.service.launch(WorkerConfig(**{**TINY, **changes}))
    try:
        error = status_of(roles, request(), roles.route(other.address))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION and field in error.details()
    finally:
        other.stop()


def test_a_lost_prefill_worker_is_retried_on_the_next_or_unavailable(roles):
    expected = roles.ask_local(request()).tokens
    (answer,) = roles.ask(request(), route=roles.route("127.0.0.1:1", roles.prefill.address))
    assert answer.tokens == expected and answer.stats.prefill_retries == 1
    error = status_of(roles, request(), roles.route("127.0.0.1:1"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_a_prefill_worker_that_dies_in_mid_stream_never_yields_a_cut_answer():
    with running(prefill={"chunk": 1}) as roles:
        dying = prefill_worker.service.launch(WorkerConfig(**{**TINY, "chunk": 1}))
        asked = request(n=900)

        async def main() -> list[int]:
            channel = make_channel(roles.decode.address)
            route = roles.route(dying.address, roles.prefill.address)
            task = asyncio.ensure_future(Roles.one(channel, asked, route))
            await asyncio.sleep(0.3)
            assert not task.done()
            await asyncio.to_thread(dying.stop)
            answer = await task
            await channel.close()
            assert answer.stats.prefill_retries == 1
            return answer.tokens

        assert run_client(main()) == roles.ask_local(asked).tokens


def test_by_policy_the_decode_worker_prefills_when_nobody_else_can():
    decode = decode_worker.service.launch(WorkerConfig(**{**TINY, "role": "decode", "on_prefill_failure": "local"}))
    with running() as roles:
        helped = Roles(roles.prefill, decode, roles.local)
        (answer,) = helped.ask(request(), route=helped.route("127.0.0.1:1"))
        assert answer.tokens == roles.ask_local(request()).tokens and answer.stats.kv_bytes == 0
        assert answer.stats.prefill_worker == answer.stats.decode_worker
        assert wait_until(lambda: helped.held() == 0)
    decode.stop()


def damage(monkeypatch, group: str) -> None:
    """Flip one bit of the first KV payload of ``group`` after the sender has counted it."""
    from pdspec.transfer import frames
    from pdspec.transfer.wireformat import byte_views

    real, hit = frames.Pages.pack, []

    def pack(self):
        header, payload = real(self)
        if self.group == group and not hit:
            hit.append(1)
            whole = b"".join(byte_views(payload))
            payload = whole[:-1] + bytes([whole[-1] ^ 1])
        return header, payload

    monkeypatch.setattr(frames.Pages, "pack", pack)


def test_damaged_target_kv_is_never_used(roles, monkeypatch):
    damage(monkeypatch, "target")
    error = status_of(roles, request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "target" in error.details()
    damage(monkeypatch, "target")
    (answer,) = roles.ask(request(), route=roles.route(roles.prefill.address, roles.prefill.address))
    assert answer.tokens == roles.ask_local(request()).tokens and answer.stats.prefill_retries == 1


def test_damaged_draft_state_alone_is_rebuilt_and_counted(roles, monkeypatch):
    damage(monkeypatch, "draft/eagle3")
    local = roles.ask_local(request())
    (answer,) = roles.ask(request())
    assert (answer.tokens, answer.traces) == (local.tokens, local.traces)
    assert answer.stats.draft_rebuilds == 1 and answer.stats.prefill_retries == 0


def test_more_than_the_pool_holds_waits_and_is_served_and_too_much_is_refused():
    with running(decode={"cache_tokens": 512}) as roles:
        many = [request(seed=i, n=40) for i in range(8)]
        for asked, answer in zip(many, roles.ask(*many), strict=True):
            assert answer.tokens == roles.ask_local(asked).tokens
        error = status_of(roles, request(n=60, sampling={"max_tokens": 900}))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
