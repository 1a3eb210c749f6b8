"""Prompts that begin alike and come at once (n samples of one): the first computes, the others wait for its pages.

enter ─▶ is the first page that is missing being made? ── no ─▶ claim what is missing, go on
  ▲                        └─ yes ─▶ wait
  └──────── settle: it is kept, or its maker has left ◀──┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from pdspec.engine.thread import EngineThread, tell

Wake = Callable[[], None]


class Claims:
    """Which pages are being made, and who waits for one. Engine thread only; ``len`` is how many wait."""

    def __init__(self) -> None:
        self._makers: dict[object, object] = {}
        self._waiting: list[Wake] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, maker: object, missing: Sequence[object], wake: Wake) -> bool:
        """Claim the pages ``missing``, in their order; False, and ``wake`` is called later, when another maker has the
        first of them."""
        if missing and self._makers.get(missing[0], maker) is not maker:
            self._waiting.append(wake)
            return False
        for key in missing:
            self._makers.setdefault(key, maker)
        return True

    def settle(self, maker: object) -> None:
        """A maker is done, or has left. Safe to repeat."""
        own = [key for key, one in self._makers.items() if one is maker]
        if not own:
            return
        for key in own:
            del self._makers[key]
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()


async def entered(engine: EngineThread, enter: Callable[[Wake], bool]) -> None:
    """Returns once ``enter(wake)``, called on the engine thread, is True; it is tried again whenever it was woken."""
    loop = asyncio.get_running_loop()
    while True:
        woken = asyncio.Event()
        if await engine.call(partial(enter, partial(tell, loop, woken.set))):
            return
        await woken.wait()
