"""How repetitive answers are: drafters that copy shine on repetition, so every acceptance figure states its share."""

from __future__ import annotations

from collections.abc import Sequence


def repeated_marks(answer: Sequence[int], n: int = 8) -> list[bool]:
    """Of each token: whether it stands inside an n-gram which occurred earlier in the answer."""
    seen: set[tuple[int, ...]] = set()
    marked = [False] * len(answer)
    for start in range(len(answer) - n + 1):
        gram = tuple(answer[start : start + n])
        if gram in seen:
            marked[start : start + n] = [True] * n
        seen.add(gram)
    return marked


def repeated_share(answers: Sequence[Sequence[int]], n: int = 8) -> float:
    """Share of tokens that stand inside an n-gram which occurred earlier in the same answer, over all answers."""
    total = sum(map(len, answers))
    return sum(sum(repeated_marks(answer, n)) for answer in answers) / total if total else 0.0
