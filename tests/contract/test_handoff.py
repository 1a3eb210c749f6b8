"""What a decode worker makes of a handoff that is not as it should be: damaged target KV is never used, damaged draft
state is rebuilt, and either way the client gets the tokens of plain decoding or a clear status."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from pdspec.transfer import frames
from pdspec.transfer.frames import Alive, Begin, Done, DraftStart, First, HiddenRows, Pages, parse_frame
from pdspec.transfer.schema import Frame
from pdspec.types import SamplingParams
from tests.contract.tampering import (
    DRAFT,
    TARGET,
    Edit,
    alien_ids,
    cut,
    drop,
    flip,
    half_heads,
    is_kind,
    next_layer,
    next_row,
    once,
    other_hash,
    other_rows,
    serve_stream,
    swap,
    tampered,
    twice,
    with_,
)
from tests.parity.roles import Answer, Roles, held_by, request, run_client, running, wait_until

ASKED = request("eagle3", "chain(3)", n=45, sampling={"max_tokens": 24, "temperature": 0.8})


@pytest.fixture(scope="module")
def shared() -> Iterator[Roles]:
    with running(decode={"stall_timeout_s": 0.6}, prefill={"chunk": 16}) as roles:
        yield roles


@pytest.fixture
def roles(shared: Roles) -> Iterator[Roles]:
    """Whatever a test does, nothing stays allocated and both engines live."""
    yield shared
    assert wait_until(lambda: shared.held() == 0), f"{shared.held()} pages are still held"
    for worker in (shared.prefill, shared.decode):
        worker.engine.post(worker.engine.host.check_integrity).result(10)
        assert worker.alive()


@pytest.fixture(scope="module")
def expected(shared: Roles) -> Answer:
    return shared.ask_local(ASKED)


TARGET_DAMAGE: dict[str, tuple[bool, Callable[[], Edit]]] = {  # name: (the liar signs its Done, the edit)
    "a flipped bit": (False, lambda: once(TARGET, flip)),
    "a flipped bit in the last frame": (False, lambda: once(TARGET, flip, 11)),
    "a cut payload": (False, lambda: once(TARGET, cut)),
    "a cut payload, signed": (True, lambda: once(TARGET, cut)),
    "a cut frame": (False, lambda: once(TARGET, lambda f: [f.to_bytes()[:-3]])),
    "garbage": (False, lambda: once(TARGET, lambda f: [b"\xff" * 40])),
    "two frames in another order": (False, swap),
    "a lost frame": (False, lambda: once(TARGET, drop)),
    "a lost frame, signed": (True, lambda: once(TARGET, drop)),
    "a repeated frame": (False, lambda: once(TARGET, twice)),
    "a repeated frame, signed": (True, lambda: once(TARGET, twice)),
    "a frame of another epoch": (False, lambda: once(TARGET, with_(epoch=1))),
    "another layer": (True, lambda: once(TARGET, next_layer)),
    "a layer that is not there": (True, lambda: once(TARGET, with_(layer=77))),
    "rows shifted by one": (True, lambda: once(TARGET, next_row, 4)),
    "rows beyond the prompt": (True, lambda: once(TARGET, with_(start=2000))),
    "half of the heads": (True, lambda: once(TARGET, half_heads)),
    "a group that is not there": (True, lambda: once(TARGET, with_(group="draft/7"))),
    "another row count in Begin": (False, lambda: once(is_kind(Begin), other_rows, 0)),
    "no Begin": (False, lambda: once(is_kind(Begin), drop, 0)),
    "two Begins": (False, lambda: once(is_kind(Begin), twice, 0)),
    "a gap in the draft KV, signed": (True, lambda: once(DRAFT, drop)),  # a stream that lies about one lies about all
    "no First": (False, lambda: once(is_kind(First), drop, 0)),
    "a First outside the vocabulary": (False, lambda: once(is_kind(First), with_(token_id=10**6), 0)),
    "no Done": (False, lambda: once(is_kind(Done), drop, 0)),
    "another hash in Done": (False, lambda: once(is_kind(Done), other_hash, 0)),
}


@pytest.mark.parametrize("name", TARGET_DAMAGE)
def test_a_handoff_with_damaged_target_kv_is_never_used(roles, expected, name):
    sign, edit = TARGET_DAMAGE[name]

    async def scenario() -> tuple[Answer, grpc.aio.AioRpcError]:
        async with tampered(roles.prefill.address, edit, sign=sign) as evil:
            (answer,) = await roles._ask([ASKED], roles.route(evil, roles.prefill.address))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await roles._ask([ASKED], roles.route(evil))
            return answer, caught.value

    answer, error = run_client(scenario())
    assert (answer.tokens, answer.traces) == (expected.tokens, expected.traces)
    assert answer.stats.prefill_retries == 1 and answer.stats.draft_rebuilds == 0
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "no prefill worker" in error.details()


def start_with(**changes: object) -> Callable[[], Edit]:
    return lambda: once(is_kind(DraftStart), with_(**changes), 0)


DRAFT_DAMAGE: dict[str, tuple[bool, str, Callable[[], Edit]]] = {
    "a flipped bit": (False, "prefill", lambda: once(DRAFT, flip)),
    "a flipped bit in the start": (
        False, "prefill", start_with(rows={"feature": np.zeros((1, 64), np.float32)}),
    ),
    "a lost last frame, signed": (True, "prefill", lambda: once(DRAFT, drop, 2)),
    "no start, signed": (True, "prefill", lambda: once(is_kind(DraftStart), drop, 0)),
    "a start of another shape, signed": (
        True, "prefill", start_with(rows={"feature": np.zeros((1, 63), np.float32)}),
    ),
    "a start without rows, signed": (True, "prefill", start_with(rows={})),
    "draft ids outside the vocabulary, signed": (True, "prefill", lambda: once(is_kind(DraftStart), alien_ids, 0)),
    "a flipped bit in hidden rows": (False, "decode", lambda: once(is_kind(HiddenRows), flip)),
    "lost hidden rows, signed": (True, "decode", lambda: once(is_kind(HiddenRows), drop)),
    "lost last hidden rows, signed": (True, "decode", lambda: once(is_kind(HiddenRows), drop, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAFT_DAMAGE)
def test_damage_to_draft_state_alone_is_rebuilt_and_counted(roles, expected, name):
    sign, mode, edit = DRAFT_DAMAGE[name]
    asked = dataclasses.replace(ASKED, draft_prefill=mode)

    async def scenario() -> Answer:
        async with tampered(roles.prefill.address, edit, sign=sign) as evil:
            (answer,) = await roles._ask([asked], roles.route(evil))
            return answer

    answer = run_client(scenario())
    assert (answer.tokens, answer.traces) == (expected.tokens, expected.traces)
    assert answer.stats.draft_rebuilds == 1 and answer.stats.prefill_retries == 0


def test_hidden_rows_of_another_size_are_refused(roles, expected):
    asked = dataclasses.replace(ASKED, draft_prefill="decode")

    async def scenario() -> Answer:
        async with tampered(roles.prefill.address, lambda: once(is_kind(HiddenRows), cut), sign=True) as evil:
            (answer,) = await roles._ask([asked], roles.route(evil, roles.prefill.address))
            return answer

    answer = run_client(scenario())
    assert answer.tokens == expected.tokens and answer.stats.prefill_retries == 1


def test_frames_left_over_from_another_epoch_are_dropped(roles, expected):
    def edit(frame: Frame) -> list[Frame | bytes]:
        if TARGET(frame):
            stale = dataclasses.replace(flip(frame)[0], epoch=frame.epoch + 1)  # type: ignore
            return [stale, frame, stale]
        if isinstance(frame, First):
            return [dataclasses.replace(frame, epoch=3, token_id=1), frame]
        return [frame]

    async def scenario() -> Answer:
        async with tampered(roles.prefill.address, lambda: edit, sign=False) as evil:
            (answer,) = await roles._ask([ASKED], roles.route(evil))
            return answer

    answer = run_client(scenario())
    assert answer.tokens == expected.tokens
    assert answer.stats.prefill_retries == answer.stats.draft_rebuilds == 0


def test_scores_that_are_no_numbers_end_their_own_answer_only(roles, expected):
    """A prefill worker that sends NaN and signs it: the status says so, and the batch beside it goes on."""

    def nan(frame: Frame) -> list[Frame | bytes]:
        return [dataclasses.replace(frame, payload=b"\xff" * len(frame.payload))]  # type: ignore

    async def scenario() -> tuple[Answer, BaseException]:
        async with tampered(roles.prefill.address, lambda: once(TARGET, nan), sign=True) as evil:
            well = asyncio.ensure_future(roles._ask([ASKED], roles.route()))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await roles._ask([ASKED], roles.route(evil))
            return (await well)[0], caught.value

    answer, error = run_client(scenario())
    assert answer.tokens == expected.tokens and "contain nan" in error.details()


# --- peers that say nothing, or the same for ever --------------------------------------------------------------------


def silent(after: str) -> Callable[[grpc.aio.ServicerContext], object]:
    async def handle(context: grpc.aio.ServicerContext) -> None:
        opening = parse_frame(await context.read())
        assert isinstance(opening, frames.Open)
        if after != "nothing":
            rows = {"target": 45, "draft/eagle3": 45}
            await context.write(Begin(epoch=opening.epoch, rows=rows, worker_id="silent").to_bytes())
        while True:
            await asyncio.sleep(0.1)
            if after == "alive":  # the connection lives, the step counter does not move
                await context.write(Alive(epoch=opening.epoch, steps=7).to_bytes())
            if after == "stale":  # frames of another reservation are no progress
                await context.write(First(epoch=opening.epoch + 1, token_id=1).to_bytes())

    return handle


@pytest.mark.parametrize("after", ["nothing", "begin", "alive", "stale"])
def test_a_peer_without_progress_is_cut_after_the_stall_time(roles, expected, after):
    async def scenario() -> tuple[Answer, float, grpc.aio.AioRpcError]:
        clock = asyncio.get_running_loop().time
        async with serve_stream(silent(after)) as stuck:
            (answer,) = await roles._ask([ASKED], roles.route(stuck, roles.prefill.address))
            began = clock()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await roles._ask([ASKED], roles.route(stuck))
            return answer, clock() - began, caught.value

    answer, took, error = run_client(scenario())
    assert 0.5 < took < 3 and error.code() is grpc.StatusCode.UNAVAILABLE and "no progress" in error.details()
    assert answer.tokens == expected.tokens and answer.stats.prefill_retries == 1


def test_a_busy_peer_is_not_cut(roles, expected):
    """Its step counter moves for twice the stall time before the first frame."""

    async def handle(context: grpc.aio.ServicerContext) -> None:
        opening = parse_frame(await context.read())
        rows = {"target": 45, "draft/eagle3": 45}
        await context.write(Begin(epoch=opening.epoch, rows=rows).to_bytes())  # type: ignore[attr-defined]
        for steps in range(12):
            await asyncio.sleep(0.1)
            await context.write(Alive(epoch=opening.epoch, steps=steps).to_bytes())  # type: ignore[attr-defined]
        await context.write(b"and now it dies")

    async def scenario() -> str:
        async with serve_stream(handle) as busy:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await roles._ask([ASKED], roles.route(busy))
            return caught.value.details()

    assert "no progress" not in run_client(scenario())


# --- what must not move ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["max_tokens", "stop id"])
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_an_answer_of_one_token_asks_for_no_kv_and_no_draft(roles, expected, ends, mode):
    seen: list[Frame] = []

    def edit(frame: Frame) -> list[Frame | bytes]:
        seen.append(frame)
        return [frame]

    params: SamplingParams = ASKED.sampling
    if ends == "max_tokens":
        params = dataclasses.replace(params, max_tokens=1)
    else:
        params = dataclasses.replace(params, stop_ids=(expected.tokens[0],))
    asked = dataclasses.replace(ASKED, sampling=params, draft_prefill=mode)

    async def scenario() -> Answer:
        async with tampered(roles.prefill.address, lambda: edit, sign=False) as watched:
            (answer,) = await roles._ask([asked], roles.route(watched))
            return answer

    answer = run_client(scenario())
    assert answer.tokens == expected.tokens[:1]
    assert roles.ask_local(asked).tokens == answer.tokens
    (alone,) = roles.ask(asked, route=dataclasses.replace(roles.route(), prefill=()))
    assert alone.tokens == answer.tokens and held_by(roles.decode) == 0
    assert answer.stats.draft_kv_bytes == 0 and not any(isinstance(frame, DraftStart) for frame in seen)
    if ends == "max_tokens":
        assert not any(isinstance(frame, Pages | HiddenRows) for frame in seen) and answer.stats.kv_bytes == 0
