"""The requests of one cell, sent at their moments; each answer becomes one row as soon as it ends.

A conversation's turns follow each other at once. One that is refused ends it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from pdspec.async_client import AsyncRouterClient
from pdspec.client import Access
from pdspec.errors import DeadlineExceeded, Overloaded, PdspecError, PeerLost
from pdspec.study.cells.loads import Load, starts
from pdspec.types import GenerationStats, UserRequest

Row = dict[str, Any]
_REFUSED = (Overloaded, DeadlineExceeded)  # what a loaded deployment may answer; all else ends the study
_KEPT = (
    "prompt_tokens", "verifications", "drafted_tokens", "accepted_tokens", "first_draft_accepted",
    "accepted_per_position", "reached_per_position", "kv_bytes", "draft_kv_bytes", "hidden_bytes", "prefill_worker",
    "decode_worker", "queue_ms", "prefill_ms", "transfer_exposed_ms", "decode_ms", "draft_rebuilds",
    "prefill_retries", "moves", "cached_tokens", "prefill_cached_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request and what its row says of it. ``then`` makes the conversation's next turn of the answer's text."""

    request: UserRequest
    about: Row
    then: Callable[[str], Asked] | None = None


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A message of an answer. ``text`` is what a chat's next turn sends back; ``token_ids`` is empty where a server
    does not say; ``finish_reason``, ``output_tokens`` (0: as many as came) and ``stats`` come with the last."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    brings: bool = True  # something of the answer
    finish_reason: str = ""
    output_tokens: int = 0
    stats: GenerationStats | None = None


class Source(Protocol):
    """Whoever answers."""

    def stream(self, request: UserRequest) -> AsyncGenerator[Heard, None]:
        """An answer as it comes. Raises PdspecError."""


Opened = AbstractAsyncContextManager[Source]


class RouterSource:
    """A router of this project, over gRPC."""

    def __init__(self, endpoint: str, token: str = "") -> None:
        self.endpoint, self._token = endpoint, token

    async def __aenter__(self) -> Self:
        self._client = AsyncRouterClient(self.endpoint, Access(token=self._token))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def stream(self, request: UserRequest) -> AsyncGenerator[Heard, None]:
        """Raises PeerLost for a gap or a repeat, too."""
        count = 0
        async with aclosing(self._client.stream(request)) as pieces:
            async for piece in pieces:
                chunk = piece.chunk
                if chunk.start != count:
                    raise PeerLost(f"tokens {count}..{chunk.start} of an answer are missing or repeated")
                count += len(chunk.token_ids)
                yield Heard(
                    text=piece.text, token_ids=chunk.token_ids, brings=bool(chunk.token_ids), output_tokens=count,
                    finish_reason=str(chunk.finish_reason) if chunk.finish_reason else "", stats=chunk.stats,
                )  # fmt: skip


def send(
    source: Opened, asked: Sequence[Asked], load: Load, *, seed: int, on_row: Callable[[Row], object]
) -> None:
    """Send all, wait for all. ``on_row`` gets each row when its answer ends: times in milliseconds, ``asked_s`` in
    seconds since the first request. Raises the first PdspecError that is no refusal; what is left is cancelled then."""
    asyncio.run(_send(source, asked, load, seed, on_row))


async def _send(
    source: Opened, asked: Sequence[Asked], load: Load, seed: int, on_row: Callable[[Row], object]
) -> None:
    async with source as client:
        began = time.perf_counter()

        async def one(item: Asked, due_s: float | None) -> None:
            if due_s is not None:
                await asyncio.sleep(max(0.0, began + due_s - time.perf_counter()))
            row, text = await _answer(client, item, began, due_s)
            on_row(row)
            while item.then is not None and not row["error"]:
                item = await asyncio.to_thread(item.then, text)  # a long chat takes its time to tokenize
                row, text = await _answer(client, item, began, None)
                on_row(row)

        async def lane(items: list[Asked]) -> None:
            while items:
                await one(items.pop(0), None)

        try:
            async with asyncio.TaskGroup() as group:
                if load.kind == "closed":
                    waiting = list(asked)
                    for _ in range(load.size):
                        group.create_task(lane(waiting))
                else:
                    for item, due_s in zip(asked, starts(load, len(asked), seed), strict=True):
                        group.create_task(one(item, due_s))
        except* PdspecError as errors:
            raise _first(errors) from errors


def _first(group: BaseExceptionGroup[PdspecError]) -> PdspecError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


async def _answer(client: Source, item: Asked, began: float, due_s: float | None) -> tuple[Row, str]:
    """Row and text. ``due_s``: when an open load wanted it; its delays count from then."""
    sent = time.perf_counter()
    origin = sent if due_s is None else min(sent, began + due_s)
    times, counts, ids, texts = list[float](), list[int](), list[int](), list[str]()
    last, error = Heard(), ""
    try:
        async with aclosing(client.stream(item.request)) as messages:
            async for last in messages:
                texts.append(last.text)
                if last.brings:
                    times.append(1e3 * (time.perf_counter() - origin))
                    counts.append(len(last.token_ids))
                    ids += last.token_ids
    except _REFUSED as refused:
        error, last = f"{type(refused).__name__}: {refused}", Heard()
        times, counts, ids = [], [], []
    if not error and not (last.finish_reason and times):
        raise PeerLost("an answer ended without its last message")
    kept = {name: value for name, value in asdict(last.stats or GenerationStats()).items() if name in _KEPT}
    row = {
        **item.about, **kept, "asked_s": origin - began, "output_tokens": last.output_tokens or len(times),
        "token_ids": ids, "ttft_ms": times[0] if times else None, "total_ms": times[-1] if times else None,
        "piece_ms": times, "piece_tokens": counts if ids else [], "finish_reason": last.finish_reason, "error": error,
    }  # fmt: skip
    return row, "".join(texts)
