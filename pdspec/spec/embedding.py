"""What a head's file repeats of the target: the same, or the head's own."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from pdspec.cache.paged import DTYPES
from pdspec.model.ops import Ops
from pdspec.spec.headfile import StoredHead
from pdspec.spec.stored import EMBEDDING

_COMPARED = 4096  # rows at once
log = logging.getLogger(__name__)


def is_same(tensor: torch.Tensor, packed: Any, ops: Ops, dtype: str) -> bool:
    """Whether a stored matrix [V, H] is what ``ops`` packed of the target's in ``dtype``."""
    for start in range(0, len(tensor), _COMPARED):
        ids = np.arange(start, min(start + _COMPARED, len(tensor)), dtype=np.int32)
        ours = tensor[start : start + len(ids)].to(DTYPES[dtype]).float()
        if not torch.equal(ours, ops.embed(packed, ids).cpu()):
            return False
    return True


def own_embedding(head: StoredHead, embedding: Any, ops: Ops, dtype: str) -> Any:
    """The embedding that a head reads, packed: its file's where that is another than the target's, as heads trained
    with theirs have it; the target's otherwise, which costs no memory."""
    tensor = head.shared.get(EMBEDDING)
    if tensor is None or is_same(tensor, embedding, ops, dtype):
        return embedding
    log.info("the head brings an embedding of its own: %d x %d values beside the target's", *tensor.shape)
    return ops.pack(tensor.to(DTYPES[dtype]))
