"""Examples of different lengths as one flat batch, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Example:
    """One sample ready to train on. ``hidden`` float32 [N, C+1, H]; ``best`` int64 [N], -1 where unknown."""

    tokens: torch.Tensor  # [N] int64
    best: torch.Tensor
    hidden: torch.Tensor
    prompt_tokens: int


class Packed:
    """Examples one after the other: rows i = 0..N-3 of each (row N-3 predicts the last token)."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.bounds, query, final_row, limit = [0], [], [], []
        finals, bests, offset = [], [], 0
        for example in examples:
            rows = len(example.tokens) - 2
            first = min(max(example.prompt_tokens - 2, 0), rows)
            start = self.bounds[-1]
            self.bounds.append(start + rows)
            query.append(torch.arange(start + first, start + rows))
            limit.append(torch.full((rows - first,), start + rows))
            # the row that predicts t_{i+2} matches target row i+1; kept are target rows first+1 .. N-2
            final_row.append(torch.arange(rows) - first + offset)
            finals.append(example.hidden[first + 1 : rows + 1, -1])
            bests.append(example.best[first + 1 : rows + 1])
            offset += rows - first
        self.query, self.limit = torch.cat(query), torch.cat(limit)
        self.final_row = torch.cat(final_row)
        self.final, self.best = torch.cat(finals), torch.cat(bests)
        self.positions = torch.cat([torch.arange(len(e.tokens) - 2) for e in examples])
        self.captured = torch.cat([e.hidden[: len(e.tokens) - 2, :-1].flatten(1) for e in examples])
        self._tokens = torch.cat([e.tokens for e in examples])
        self._token_row = torch.cat([torch.arange(len(e.tokens) - 2) + 2 * n for n, e in enumerate(examples)])
        self._token_row += torch.cat([torch.full((len(e.tokens) - 2,), self.bounds[n]) for n, e in enumerate(examples)])
        self.next_ids = self._tokens[self._token_row + 1]

    @staticmethod
    def own(examples: Sequence[Example]) -> torch.Tensor:
        """[F, H]: each flat row's own hidden state after the final norm."""
        return torch.cat([example.hidden[: len(example.tokens) - 2, -1] for example in examples])

    def ids_after(self, rows: torch.Tensor, step: int) -> torch.Tensor:
        """t_{i+1+step} of flat rows; any token where there is none."""
        return self._tokens[(self._token_row[rows] + 1 + step).clamp(max=len(self._tokens) - 1)]

    def alive(self, step: int) -> torch.Tensor:
        """Indices into ``query`` of rows that still have a token to predict in ``step``."""
        return torch.nonzero(self.query + step < self.limit)[:, 0]

    def counts(self, alive: torch.Tensor) -> list[int]:
        """Queries of each example among ``alive``."""
        edges = torch.searchsorted(self.query[alive], torch.tensor(self.bounds))
        return [int(n) for n in edges.diff()]


class Keys:
    """Keys and values of step 0 [F, G, D], and each query's own rows of later steps [Q, G, D]."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self.own_k: list[torch.Tensor] = []
        self.own_v: list[torch.Tensor] = []

    def extend(self, k: torch.Tensor, v: torch.Tensor, alive: torch.Tensor, queries: int) -> None:
        """Own rows of one more step, of the queries still ``alive``."""
        for held, new in ((self.own_k, k), (self.own_v, v)):
            held.append(torch.zeros(queries, *new.shape[1:]).index_copy(0, alive, new))

    def own(self, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Own rows so far of ``alive``, [J, M, G, D] twice."""
        if not self.own_k:
            none = self.k.new_empty(0, len(alive), *self.k.shape[1:])
            return none, none
        return torch.stack([k[alive] for k in self.own_k]), torch.stack([v[alive] for v in self.own_v])


def alive_in(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Where the members of sorted ``now`` stand in sorted ``before``, of which they are a part."""
    return torch.searchsorted(before, now)
