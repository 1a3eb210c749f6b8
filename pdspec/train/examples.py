"""From stored samples to training examples: seeded order, cut to length, hidden rows from disk or from the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pdspec.cache.paged import PagedCache
from pdspec.cache.pool import pages_for
from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.spec.eagle3.config import default_fused_layers
from pdspec.train.data import PAGE_SIZE, Target
from pdspec.train.packing import Example
from pdspec.train.store import Sample, TokenStore


class ExampleReader:
    """Batches of examples of some stores. ``coverage`` is the draft vocabulary's share of their answers, carried for
    the card. ``open_target`` is called once, when hidden rows are not stored."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        max_length: int,
        coverage: float,
        open_target: Callable[[], Target] | None = None,
    ) -> None:
        self.coverage, self._max_length, self._open = coverage, max_length, open_target
        self._target: Target | None = None
        self._where = [
            (store, number)
            for store in stores
            for number, (prompt, tokens) in enumerate(store.lengths())
            if tokens >= prompt + 3 and prompt + 3 <= max_length
        ]
        if not self._where:
            raise ConfigError("no sample with an answer of three tokens", field="data", remedy="generate more")

    def __len__(self) -> int:
        return len(self._where)

    @property
    def stored(self) -> bool:
        """Whether all hidden rows are on disk."""
        return all(store.has_hidden for store, _ in self._where)

    def batches_per_pass(self, size: int) -> int:
        """Whole batches of ``size`` samples (at least one)."""
        return max(1, len(self._where) // size)

    def batch(self, step: int, size: int, seed: int) -> list[Example]:
        """Batch ``step`` of the order that ``seed`` fixes; each pass is shuffled anew."""
        turn, place = divmod(step, self.batches_per_pass(size))
        order = np.random.Generator(np.random.PCG64([seed, turn])).permutation(len(self._where))
        return [self.example(int(n)) for n in order[place * size : (place + 1) * size]]

    def example(self, number: int) -> Example:
        """One sample."""
        store, place = self._where[number]
        sample = store.read(place)
        tokens = sample.tokens[: self._max_length]
        if sample.hidden is not None:
            rows = torch.from_numpy(sample.hidden[: self._max_length].view(np.int16)).view(torch.bfloat16).float()
        else:
            rows = self._compute(sample)
        return Example(
            torch.from_numpy(tokens.astype(np.int64)),
            torch.from_numpy(sample.best[: self._max_length].astype(np.int64)),
            rows,
            sample.prompt_tokens,
        )

    def _compute(self, sample: Sample) -> torch.Tensor:
        if self._target is None:
            if self._open is None:
                raise ConfigError(
                    "the store holds no hidden rows", field="data", remedy="give a target to compute them"
                )
            self._target = self._open()
        return hidden_rows(self._target, sample.tokens[: self._max_length])


def hidden_rows(target: Target, tokens: np.ndarray) -> torch.Tensor:
    """[N, C+1, H] float32 of one token sequence: captured layer inputs, then the state after the final norm. The last
    token is not run; its row is zero."""
    rows = len(tokens) - 1
    config, pages = target.runner.config, pages_for(rows, PAGE_SIZE)
    slots = np.arange(rows, dtype=np.int32)
    out = target.runner.forward(
        ForwardBatch(
            token_ids=np.ascontiguousarray(tokens[:-1], np.int32),
            positions=slots,
            sequence=np.zeros(rows, np.int32),
            slots=slots,
            prefix_len=slots + 1,
            ancestors=np.empty((rows, 0), np.int32),
            page_table=np.arange(pages, dtype=np.int32)[None],
            logit_rows=np.array([rows - 1], np.int32),
            capture=default_fused_layers(config.num_layers),
            want_final=True,
        ),
        PagedCache((target.runner.group,), pages, PAGE_SIZE),
    )
    if out.captured is None or out.final is None:
        raise ValueError("the runner returned no hidden rows")
    both = torch.cat((out.captured, out.final[:, None]), 1)
    return torch.cat((both, torch.zeros(1, *both.shape[1:])))
