"""Which KV rows the drafting target sees. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pdspec.errors import ConfigError

Ints = npt.NDArray[np.int32]
SELECTIONS = ("window", "snapkv")
OBSERVED = 32  # prompt rows at the end whose attention chooses; always chosen themselves
_LARGEST = 1 << 22


@dataclass(frozen=True, kw_only=True)
class View:
    """The first ``sink`` and the last ``window`` rows before the root, and with ``select`` "snapkv" the ``budget``
    prompt rows that the end of the prompt attended to most."""

    sink: int
    window: int
    select: str
    budget: int

    @classmethod
    def parse(cls, sink: str, window: str, select: str, budget: str) -> View:
        """Of option strings. Raises ConfigError naming the option."""
        if select not in SELECTIONS:
            raise ConfigError(f"no selection {select!r}", field="options.sparse:select",
                              remedy="use " + " or ".join(SELECTIONS))
        return cls(sink=_number("sink", sink, 0), window=_number("window", window, 0), select=select,
                   budget=_number("budget", budget, OBSERVED))

    def num_selected(self, prompt_len: int) -> int:
        """Rows chosen from a prompt."""
        return min(self.budget, prompt_len) if self.select == "snapkv" else 0

    def rows(self, committed: int, selected: Ints) -> tuple[int, Ints]:
        """What is seen of ``committed`` rows: the length of the prefix seen without a gap, and the rows behind it,
        ascending."""
        parts: Sequence[Any] = (
            np.arange(min(self.sink, committed), dtype=np.int32), selected,
            np.arange(max(0, committed - self.window), committed, dtype=np.int32),
        )
        seen = np.unique(np.concatenate(parts)).astype(np.int32)
        prefix = int((seen == np.arange(len(seen))).sum())  # ascending and distinct: once behind, always behind
        return prefix, seen[prefix:]


def _number(name: str, text: str, low: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= _LARGEST:
        raise ConfigError(f"{name} is {text!r}", field=f"options.sparse:{name}",
                          remedy=f"use a whole number in {low}..{_LARGEST}")
    return int(text)
