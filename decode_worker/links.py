"""Which ways to prefill workers failed lately: tried last, and told to the router, which routes around them."""

from __future__ import annotations

import time

REMEMBER_S = 5.0  # then a way counts as mended until it fails again; a success mends it at once


class Links:
    """By ``Route.link``."""

    def __init__(self) -> None:
        self._failed: dict[str, float] = {}

    def fail(self, link: str) -> None:
        """The peer could not be reached, or broke off, or stood still."""
        self._failed[link] = time.monotonic()

    def up(self, link: str) -> None:
        """The peer answered whole."""
        self._failed.pop(link, None)

    def is_down(self, link: str) -> bool:
        """Whether it failed within ``REMEMBER_S`` and has not worked since."""
        return time.monotonic() - self._failed.get(link, -REMEMBER_S) < REMEMBER_S

    def down(self) -> tuple[str, ...]:
        """Every link that is."""
        self._failed = {link: at for link, at in self._failed.items() if self.is_down(link)}
        return tuple(self._failed)
