"""The Jacobi window of lookahead decoding (2402.02057, section 3): W columns, N - 1 levels of guesses.

    level 0    root  a1  a2  a3        row (l, i) stands at position root + l + i and sees the root, level 0 up to
    level 1    b0    b1  b2  b3        column i, and levels 1 .. l of its own column: a tree whose spine is level 0 and
    level 2    c0    c1  c2  c3        whose columns are chains below it

What the target says after the last level completes an N-gram in every column: (root b0 c0 x0), (a1 b1 c1 x1), … Then
each level takes the place of the one above, which is the same guess one Jacobi iteration later, and x is the last.
Until there are N - 1 levels the window grows one by one, and shrinks by a column as the root moves on. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdspec.spec.protocol import Branch

Ngram = tuple[int, ...]


@dataclass(kw_only=True)
class JacobiWindow:
    """``levels[0]`` are the guesses of columns 1 .. (the root is column 0), ``levels[l]`` of columns 0 .. ."""

    level: int  # N
    levels: list[list[int]]

    @classmethod
    def begin(cls, window: int, level: int, guesses: Sequence[int]) -> JacobiWindow:
        """A first level of W + N - 3 ``guesses``."""
        if len(guesses) != window + level - 3:
            raise ValueError(f"{len(guesses)} first guesses for W = {window}, N = {level}")
        return cls(level=level, levels=[list(guesses)])

    def branch(self) -> Branch:
        """All rows, level by level; the last level's are asked about."""
        tokens, parents = list(self.levels[0]), list(range(-1, len(self.levels[0]) - 1))
        above = [-1, *range(len(self.levels[0]))]  # the rows of the level above, by column; -1: the root
        for level in self.levels[1:]:
            parents += above[: len(level)]
            above = list(range(len(tokens), len(tokens) + len(level)))
            tokens += level
        asked = [row for row in above if row >= 0]
        return Branch(token_ids=np.array(tokens, np.int32), parents=np.array(parents, np.int32),
                      asked=np.array(asked, np.int32))

    def advance(self, root: int, branch_ids: np.ndarray) -> list[Ngram]:
        """The N-grams that ``branch_ids``, the target's best tokens after the rows that ``branch()`` asked about,
        complete; the window then is that of a root one position further. Raises ValueError for another number."""
        last = [int(token) for token in branch_ids]
        if len(last) != len(self.levels[-1]):
            raise ValueError(f"{len(last)} tokens after {len(self.levels[-1])} rows of a Jacobi window")
        if len(self.levels) < self.level - 1:
            # column 1 is column 0 now, whose token of level 0 the root is
            said = last if len(self.levels) == 1 else last[1:]
            self.levels = [level[1:] for level in self.levels] + [said]
            return []
        columns = [[root, *self.levels[0]], *self.levels[1:], last]
        self.levels = [self.levels[1][1:], *self.levels[2:], last]
        return list(zip(*columns, strict=True))


def most_rows(window: int, level: int) -> int:
    """M at most, from the first branch on."""
    return max((levels + 1) * (window + level - 2 - levels) - 1 for levels in range(level - 1))
