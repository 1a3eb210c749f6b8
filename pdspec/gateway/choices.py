"""Several answers at once, as their messages come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pdspec.resumption import Piece

_AHEAD = 64  # messages that are read before the slow reader of a stream has taken the earlier ones


async def together(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(index, piece) of all ``streams`` until the last has ended. The first error ends them all and is raised; closing
    the iterator closes every stream."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(_AHEAD)
    tasks = [asyncio.ensure_future(_feed(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(index: int, stream: AsyncGenerator[Piece, None], queue: asyncio.Queue) -> None:
    end: Exception | None = None
    try:
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                await queue.put((index, piece))
    except Exception as error:  # noqa: BLE001  raised where the pieces are read
        end = error
    await queue.put((index, end))
