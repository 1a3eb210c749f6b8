"""What goes into a target or draft forward, and what comes out.

Rows are flat: prefill chunks, decode rows and tree nodes of many sequences stand one after the other.
What a row may look at is said per row, so that one kernel serves all of them:

* the *prefix*: KV rows ``0 .. prefix_len-1`` of its sequence;
* then its *ancestors*: KV slots listed in ``ancestors`` (root first, itself last; -1 pads).

A prefill or plain decode row at slot ``s`` has ``prefix_len = s + 1`` and no ancestors. A tree node has
``prefix_len`` = committed rows and its path in ``ancestors``. A row's keys are always visited in the order
prefix, ancestors, i.e. in the order of the token prefix it stands for, which is what lets ``numerics: exact``
promise that its bits depend on that prefix alone.

Shape letters: R rows, S sequences, P pages of the longest sequence, A longest ancestor list, L logit rows,
C captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Flat rows of one forward. All index arrays are C-contiguous int32."""

    token_ids: np.ndarray  # [R]
    positions: np.ndarray  # [R] RoPE positions
    sequence: np.ndarray  # [R] index into page_table
    slots: np.ndarray  # [R] KV row of its sequence that this row writes
    prefix_len: np.ndarray  # [R]
    ancestors: np.ndarray  # [R, A]; A may be 0
    page_table: np.ndarray  # [S, P] page ids; unused entries -1
    logit_rows: np.ndarray  # [L] rows whose logits are wanted
    capture: tuple[int, ...] = ()  # hidden states wanted: the *inputs* of these layers
    want_final: bool = False  # the hidden state after the final norm, for every row
    features: torch.Tensor | None = None  # [R, F] float32: extra input of draft models

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class ForwardOutput:
    """float32, on the runner's device."""

    logits: torch.Tensor  # [L, V]
    captured: torch.Tensor | None = None  # [R, C, H]
    final: torch.Tensor | None = None  # [R, H] after the final norm
