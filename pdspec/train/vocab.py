"""The draft vocabulary: the target ids that the target writes most."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from pdspec.train.store import Sample


def answer_counts(samples: Iterable[Sample], vocab_size: int) -> np.ndarray:
    """How often each id occurs in the answers, int64 [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for sample in samples:
        counts += np.bincount(sample.tokens[sample.prompt_tokens :], minlength=vocab_size)
    return counts


def draft_vocabulary(counts: np.ndarray, size: int) -> torch.Tensor:
    """The ``size`` most frequent ids, ascending, int64 [size]; ties and ids never seen go by the lower id."""
    if not 1 <= size <= len(counts):
        raise ValueError(f"a draft vocabulary of {size} out of {len(counts)}")
    chosen = np.argsort(-counts, kind="stable")[:size]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))


def coverage(counts: np.ndarray, target_ids: torch.Tensor) -> float:
    """Share of the counted tokens that the draft vocabulary holds; 0 of nothing."""
    return float(counts[target_ids.numpy()].sum() / max(1, counts.sum()))


def move_rows(rows: torch.Tensor, ids: torch.Tensor, new_ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Output rows of another draft vocabulary, [len(new_ids), H] float32: ids that were in ``ids`` keep their row of
    ``rows``; a new one starts as the target's row in ``output`` [V, H], moved as the kept ones were on average."""
    learned = rows.float() - output[ids].float()
    moved = output[new_ids].float() + learned.mean(0)
    place = torch.full((len(output),), -1, dtype=torch.int64)
    place[ids] = torch.arange(len(ids))
    kept = place[new_ids] >= 0
    moved[kept] = rows[place[new_ids[kept]]].float()
    return moved
