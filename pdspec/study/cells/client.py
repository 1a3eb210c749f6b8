"""The requests of one cell, sent to a router at their moments; each answer becomes one row as soon as it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from pdspec.async_client import AsyncRouterClient
from pdspec.errors import DeadlineExceeded, Overloaded, PdspecError, PeerLost
from pdspec.study.cells.loads import Load, starts
from pdspec.types import GenerationStats, UserRequest

Row = dict[str, Any]
_REFUSED = (Overloaded, DeadlineExceeded)  # what a loaded deployment may answer; all else ends the study
_KEPT = (
    "prompt_tokens", "verifications", "drafted_tokens", "accepted_tokens", "first_draft_accepted",
    "accepted_per_position", "reached_per_position", "kv_bytes", "draft_kv_bytes", "hidden_bytes", "prefill_worker",
    "decode_worker", "queue_ms", "prefill_ms", "transfer_exposed_ms", "decode_ms", "draft_rebuilds",
    "prefill_retries", "moves",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request and what its row says of it."""

    request: UserRequest
    about: Row


def send(
    endpoint: str, asked: Sequence[Asked], load: Load, *, seed: int, on_row: Callable[[Row], object]
) -> None:
    """Send all, wait for all. ``on_row`` gets each row when its answer ends: times in milliseconds, ``asked_s`` in
    seconds since the first request. Raises the first PdspecError that is no refusal; what is left is cancelled then."""
    asyncio.run(_send(endpoint, asked, load, seed, on_row))


async def _send(
    endpoint: str, asked: Sequence[Asked], load: Load, seed: int, on_row: Callable[[Row], object]
) -> None:
    async with AsyncRouterClient(endpoint) as client:
        began = time.perf_counter()

        async def one(item: Asked, due_s: float | None) -> None:
            if due_s is not None:
                await asyncio.sleep(max(0.0, began + due_s - time.perf_counter()))
            on_row(await _answer(client, item, began, due_s))

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


async def _answer(client: AsyncRouterClient, item: Asked, began: float, due_s: float | None) -> Row:
    """``due_s``: when an open load wanted it; its delays count from then."""
    sent = time.perf_counter()
    origin = sent if due_s is None else min(sent, began + due_s)
    times, counts, ids = list[float](), list[int](), list[int]()
    last, error = None, ""
    try:
        async with aclosing(client.stream(item.request)) as pieces:
            async for piece in pieces:
                if piece.chunk.start != len(ids):
                    raise PeerLost(f"tokens {len(ids)}..{piece.chunk.start} of an answer are missing or repeated")
                last = piece.chunk
                if last.token_ids:
                    times.append(1e3 * (time.perf_counter() - origin))
                    counts.append(len(last.token_ids))
                    ids += last.token_ids
    except _REFUSED as refused:
        error = f"{type(refused).__name__}: {refused}"
    if not error and (last is None or last.finish_reason is None or not ids):
        raise PeerLost("an answer ended without its last message")
    stats = (last.stats if last is not None else None) or GenerationStats()
    kept = {name: value for name, value in asdict(stats).items() if name in _KEPT}
    return {
        **item.about, **kept, "asked_s": origin - began, "output_tokens": len(ids), "token_ids": ids,
        "ttft_ms": times[0] if times else None, "total_ms": times[-1] if times else None, "piece_ms": times,
        "piece_tokens": counts, "finish_reason": str(last.finish_reason) if last and last.finish_reason else "",
        "error": error,
    }  # fmt: skip
