"""Suffix trees that are never built: their nodes are found by searching the tokens (SuffixDecoding, 2411.04975).

A node of a suffix tree stands for a string, its count for the places where that string ends. Those places alone are
what drafting needs, and comparing a flat array finds them at memory speed:

    suffix … b c ──search──▶ places where the longest … b c ends ──read on──▶ what came next at each of them

So a token costs 4 to 16 bytes whatever it repeats, and nothing is rebuilt when sequences are dropped. In the arrays -1
stands before, between and behind sequences; a place is the index of the last matched token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]

MAX_MATCH = 64  # tokens
MAX_PLACES = 32  # the last ones in the array; more would hardly change a frequency
_EVERYWHERE = 8  # tokens that are matched at every place; where more places than MAX_PLACES match those, the last do
_NO_TOKEN = -2  # equal to nothing in an array


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """The longest suffix that stood before (``length`` tokens, 0: none) and what came after it at each place."""

    length: int
    continuations: Ints  # [places, horizon] token ids; -1 past the end of a sequence


class RequestTree:
    """One sequence of token ids that grows: prompt and output of a request."""

    def __init__(self) -> None:
        self._tokens = np.full(2 * MAX_MATCH, -1, np.int32)  # the sequence is [1 : 1 + num_tokens]
        self.num_tokens = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens: O(1) each."""
        needed = 1 + self.num_tokens + len(tokens) + 1
        if needed > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.full(needed, -1, np.int32)])
        self._tokens[1 + self.num_tokens : needed - 1] = tokens
        self.num_tokens += len(tokens)

    def match(self, horizon: int) -> Match:
        """Where the end of the sequence stood before in it. A place so near the end that what followed it is known for
        less than ``horizon`` tokens is read on as the loop that it would be."""
        last = self.num_tokens
        tokens = self._tokens[: last + 2]
        length, places = _longest(tokens, tokens[max(1, last + 1 - MAX_MATCH) : last + 1])
        period = (last - places)[:, None]
        return Match(length=length, continuations=tokens.take(places[:, None] + 1 + np.arange(horizon) % period))


@dataclass(kw_only=True)
class _Segment:
    """Where a sequence stands: ``length`` tokens from ``start``, room for ``room`` before the -1 that ends it."""

    start: int
    length: int
    room: int


class SharedTree:
    """Sequences under keys, at most ``capacity`` tokens together: room is made by dropping whole sequences, the one
    that began first before others. Sequences may grow in turns: one that outgrows its segment moves on with twice its
    room, and when the array is full it is packed, so that appending is O(1) a token on average."""

    def __init__(self, capacity: int) -> None:
        """Raises ValueError for a bound below one token."""
        if capacity < 1:
            raise ValueError(f"a suffix tree of {capacity} tokens")
        self.capacity = capacity
        self.num_tokens = 0
        self._tokens = np.full(2 * capacity + 2, -1, np.int32)  # fits even sequences of one token, packed
        self._high = 1  # all from here on is -1 and free
        self._segments: dict[Hashable, _Segment] = {}  # in the order in which they began

    @property
    def num_sequences(self) -> int:
        """Sequences held."""
        return len(self._segments)

    def extend(self, key: Hashable, tokens: Sequence[int]) -> None:
        """Appends to the sequence ``key``, which begins here if it is not held (any more)."""
        tokens = tokens[-self.capacity :]
        while self.num_tokens + len(tokens) > self.capacity:
            self._drop(next(iter(self._segments)))
        if not tokens:
            return
        segment = self._segments.setdefault(key, _Segment(start=0, length=0, room=0))
        if segment.length + len(tokens) > segment.room:
            self._move(segment, segment.length + len(tokens))
        end = segment.start + segment.length
        self._tokens[end : end + len(tokens)] = tokens
        segment.length += len(tokens)
        self.num_tokens += len(tokens)

    def match(self, suffix: Sequence[int], *, horizon: int, besides: Hashable = None) -> Match:
        """Where the longest possible part of ``suffix`` (its last MAX_MATCH tokens) stood with a token after it, the
        sequence ``besides`` left out."""
        tokens = self._tokens[: self._high + 1]
        without = self._segments.get(besides)
        own = (without.start, without.start + without.length) if without else (0, 0)
        length, places = _longest(tokens, np.array(suffix[-MAX_MATCH:], np.int32), own)
        found = tokens.take(places[:, None] + np.arange(1, horizon + 1), mode="clip")
        found[np.logical_or.accumulate(found < 0, axis=1)] = -1
        return Match(length=length, continuations=found)

    def _drop(self, key: Hashable) -> None:
        segment = self._segments.pop(key)
        self._tokens[segment.start : segment.start + segment.length] = -1
        self.num_tokens -= segment.length

    def _move(self, segment: _Segment, needed: int) -> None:
        """To the end of the array, with room for ``needed`` tokens at least and for twice as many where there is."""
        moved = self._tokens[segment.start : segment.start + segment.length].copy()
        self._tokens[segment.start : segment.start + segment.length] = -1
        if self._high + 2 * needed + 1 >= len(self._tokens):
            self._pack(segment)
        segment.start = self._high
        segment.room = min(2 * needed, len(self._tokens) - 1 - self._high - 1)
        self._high += segment.room + 1
        self._tokens[segment.start : segment.start + segment.length] = moved

    def _pack(self, moving: _Segment) -> None:
        """All segments but one, without gaps, oldest first."""
        packed, high = np.full_like(self._tokens, -1), 1
        for segment in self._segments.values():
            if segment is not moving:
                packed[high : high + segment.length] = self._tokens[segment.start : segment.start + segment.length]
                segment.start, segment.room = high, segment.length
                high += segment.length + 1
        self._tokens, self._high = packed, high


def _longest(tokens: Ints, suffix: Ints, without: tuple[int, int] = (0, 0)) -> tuple[int, Places]:
    """(length, places) of the longest end of ``suffix`` that has a token after it, outside of [start, stop). The first
    and the last of ``tokens`` are -1."""
    if len(suffix) == 0:
        return 0, np.empty(0, np.int64)
    recent = suffix[::-1]
    places = np.flatnonzero(tokens == recent[0])
    places = places[tokens.take(places + 1) >= 0]
    if without[0] < without[1]:
        places = places[(places < without[0]) | (places >= without[1])]
    if len(places) == 0:
        return 0, places
    length = 1
    while length < min(_EVERYWHERE, len(recent)) and len(places) > MAX_PLACES:
        further = places[tokens.take(places - length) == recent[length]]
        if len(further) == 0:
            return length, places[-MAX_PLACES:]
        length, places = length + 1, further
    places = places[-MAX_PLACES:]
    before = tokens.take(places[:, None] - np.arange(length, len(recent) + 1), mode="clip")
    more = (before != np.append(recent[length:], _NO_TOKEN)).argmax(axis=1)  # where the first difference is
    longest = int(more.max())
    return length + longest, places[more == longest]
