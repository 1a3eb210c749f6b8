"""The draft layer in one call into the CPU kernels (kernels/eagle3.c): a draft step is a dozen small operations, and
between calls from Python the kernels' threads would fall asleep."""

from __future__ import annotations

import ctypes as c
from typing import Any, ClassVar

import numpy as np
import torch

from pdspec.model.batch import ForwardBatch
from pdspec.model.native import NativeOps, Packed, cache_struct, rows_struct
from pdspec.model.ops import Rope
from pdspec.spec.eagle3.config import Eagle3Config

_WEIGHTS = ("embedding", "qkv", "o", "gate_up", "down")
_NORMS = ("input_norm", "hidden_norm", "post_norm")


class Eagle3Struct(c.Structure):
    """eagle3.c: Eagle3."""

    _fields_: ClassVar[Any] = [
        *((name, c.c_int32) for name in ("H", "Hq", "Hk", "D", "I", "bf16")),
        ("eps", c.c_float),
        *((name, c.c_void_p) for name in ("cos", "sin", *_WEIGHTS, *_NORMS)),
    ]


class NativeLayer:
    """Pointers into ``weights`` and ``norms``, by the names of the C structure; both are kept alive."""

    def __init__(
        self, ops: NativeOps, config: Eagle3Config, rope: Rope, pages: torch.Tensor, weights: dict[str, Packed],
        norms: dict[str, torch.Tensor],
    ) -> None:
        self.ops, self.hidden = ops, config.hidden_size
        self._kept = rope, pages, weights, norms
        self._struct = Eagle3Struct(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size,
            int(weights["qkv"].bf16), config.rms_norm_eps, rope.cos.data_ptr(), rope.sin.data_ptr(),
            *(weights[name].data.data_ptr() for name in _WEIGHTS), *(norms[name].data_ptr() for name in _NORMS),
        )
        self._cache = cache_struct(pages)
        self._vocab = weights["embedding"].rows

    def __call__(self, batch: ForwardBatch, features: torch.Tensor, outputs: np.ndarray) -> torch.Tensor:
        """As ``Eagle3Head.forward``. Raises ValueError for ids or features that do not fit."""
        tokens, wanted = batch.token_ids, np.ascontiguousarray(outputs, np.int32)
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self._vocab):
            raise ValueError(f"token id out of range 0..{self._vocab - 1}")
        if features.dtype != torch.float32 or tuple(features.shape) != (batch.num_rows, self.hidden):
            raise ValueError(f"features {features.dtype} {tuple(features.shape)} for {batch.num_rows} rows")
        features, rows = features.contiguous(), rows_struct(batch)
        out = torch.empty(len(wanted), self.hidden)
        status = self.ops.lib.pd_eagle3(
            self.ops.pool, c.byref(self._struct), c.byref(rows), c.byref(self._cache),
            c.c_void_p(tokens.ctypes.data), c.c_void_p(features.data_ptr()), c.c_void_p(wanted.ctypes.data),
            len(wanted), c.c_void_p(out.data_ptr()),
        )
        if status:
            raise MemoryError("draft layer")
        return out
