"""The text of an answer while its tokens come: stop strings are found in the text, since only it shows them.

Whoever holds the tokenizer uses this: the router, and generation in one process. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


class TextStream(Protocol):
    """An incremental detokeniser: ``pdspec.model.tokenizer.TextStream``."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete."""

    def flush(self) -> str:
        """What is left at the end."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text that is certain now. ``stop_match`` is the stop string that ended the answer; then only the first
    ``num_tokens`` of the pushed ids belong to it, the one that completed the match included."""

    text: str
    num_tokens: int
    stop_match: str = ""


class AnswerText:
    """Holds back text that a stop string may begin with, and cuts the answer at the first match.

    Stop strings are looked for in the text of token number ``min_tokens`` (counted from 1) and later.
    """

    def __init__(self, stream: TextStream, *, stop_strings: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._stream = stream
        self._stops = tuple(stop_strings)
        self._unchecked = min_tokens
        self._held = ""

    def push(self, ids: Sequence[int]) -> Piece:
        """The text that ``ids`` make certain."""
        if not self._stops:
            return Piece(text=self._stream.push(ids), num_tokens=len(ids))
        out = ""
        for index, token in enumerate(ids):
            fresh = self._stream.push((token,))
            if self._unchecked > 1:
                self._unchecked -= 1
                out += fresh
                continue
            self._held += fresh
            if match := _first_match(self._held, self._stops):
                at, stop = match
                return Piece(text=out + self._held[:at], num_tokens=index + 1, stop_match=stop)
            safe = len(self._held) - _held_back(self._held, self._stops)
            out, self._held = out + self._held[:safe], self._held[safe:]
        return Piece(text=out, num_tokens=len(ids))

    def flush(self) -> str:
        """The end of an answer that no stop string ended: what was held back, and unfinished characters."""
        held, self._held = self._held, ""
        return held + self._stream.flush()


def _first_match(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(index, stop) of the earliest match, the longest at that place."""
    found = [(at, -len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that a stop string begins with."""
    longest = min(len(text), max(len(stop) for stop in stops) - 1)
    for size in range(longest, 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
