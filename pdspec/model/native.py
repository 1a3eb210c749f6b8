"""ctypes mirror of the C kernels: structures, and ``NativeOps``, the CPU implementation of ``Ops``.

All calls release the GIL. Tensors passed in are float32 (weights packed in bf16 or float32), contiguous.
"""

from __future__ import annotations

import ctypes as c
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from pdspec.errors import ConfigError
from pdspec.model.batch import ForwardBatch
from pdspec.model.build import load_kernels
from pdspec.model.variants import Moe

_i32, _f32, _ptr = c.c_int32, c.c_float, c.c_void_p
MAX_GROUP, MAX_DIM = 16, 640  # attention.c: query heads that share a KV head, and its size


class RowsStruct(c.Structure):
    """layout.h: Rows."""

    _fields_: ClassVar[Any] = [
        ("R", _i32),
        ("P", _i32),
        ("A", _i32),
        ("positions", _ptr),
        ("sequence", _ptr),
        ("slots", _ptr),
        ("prefix_len", _ptr),
        ("ancestors", _ptr),
        ("page_table", _ptr),
    ]


class CacheStruct(c.Structure):
    """layout.h: Cache."""

    _fields_: ClassVar[Any] = [("data", _ptr)] + [
        (n, _i32) for n in ("page_shift", "heads", "dim", "bf16", "parts")
    ]


class LayerStruct(c.Structure):
    """decoder.c: Layer."""

    _fields_: ClassVar[Any] = [
        (n, _ptr) for n in ("qkv", "o", "gate_up", "down", "qkv_bias", "input_norm", "post_norm", "q_norm", "k_norm")
    ]


class ModelStruct(c.Structure):
    """decoder.c: Model."""

    _fields_: ClassVar[Any] = [(n, _i32) for n in ("H", "Hq", "Hk", "D", "I", "bf16")] + [
        ("eps", _f32),
        ("cos", _ptr),
        ("sin", _ptr),
        ("layers", _ptr),
    ]


class ScratchStruct(c.Structure):
    """decoder.c: Scratch."""

    _fields_: ClassVar[Any] = [(n, _ptr) for n in ("norm", "qkv", "attn", "gate_up", "act")]


class RouteStruct(c.Structure):
    """experts.c: Route."""

    _fields_: ClassVar[Any] = [
        (n, _i32) for n in ("experts", "chosen", "groups", "groups_kept", "sigmoid", "normalise")
    ] + [("scaling", _f32)]


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] in the kernels' layout [ceil(N/16)][K][16]."""

    data: torch.Tensor
    rows: int  # N
    cols: int  # K

    @property
    def bf16(self) -> bool:
        """Whether the elements are bfloat16 (else float32)."""
        return self.data.dtype == torch.bfloat16


def _p(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows_struct(batch: ForwardBatch) -> RowsStruct:
    """View of the batch's index arrays; valid while the batch lives."""
    return RowsStruct(
        batch.num_rows,
        batch.page_table.shape[1],
        batch.ancestors.shape[1],
        batch.positions.ctypes.data,
        batch.sequence.ctypes.data,
        batch.slots.ctypes.data,
        batch.prefix_len.ctypes.data,
        batch.ancestors.ctypes.data,
        batch.page_table.ctypes.data,
    )


def cache_struct(layer: torch.Tensor) -> CacheStruct:
    """``layer``: [pages, page_size, k|v or 1, heads, dim]."""
    _, page_size, parts, heads, dim = layer.shape
    if page_size & (page_size - 1):
        raise ConfigError(f"{page_size} is not a power of two", field="page_size", remedy="use 8, 16, 32 or 64")
    bf16 = int(layer.dtype == torch.bfloat16)
    return CacheStruct(layer.data_ptr(), page_size.bit_length() - 1, heads, dim, bf16, parts)


class NativeOps:
    """Row-invariant CPU operations with a thread pool of their own. One per process; used by one thread at a
    time (the engine thread)."""

    name = "native"
    device = torch.device("cpu")

    def __init__(self, threads: int, *extra_flags: str) -> None:
        self.lib = load_kernels(*extra_flags)
        self.lib.pd_pool_create.restype = _ptr
        self.threads = max(1, threads)
        self.rounds_inputs = bool(self.lib.pd_rounds_inputs())  # products with bf16 weights read activations in bf16
        self.pool = _ptr(self.lib.pd_pool_create(self.threads))

    def close(self) -> None:
        """Stop the threads. Idempotent; no operation may follow."""
        if self.pool:
            self.lib.pd_pool_destroy(self.pool)
            self.pool = _ptr(None)

    def __del__(self) -> None:
        if getattr(self, "pool", None):
            self.close()

    def pack(self, weight: torch.Tensor) -> Packed:
        """Pack [N, K], bf16 or float32; K a multiple of 16."""
        rows, cols = weight.shape
        if weight.dtype not in (torch.bfloat16, torch.float32) or cols % 16:
            raise ConfigError(
                f"cannot pack a {weight.dtype} weight of shape {tuple(weight.shape)}",
                field="dtype",
                remedy="use bfloat16 or float32 and inner sizes that are multiples of 16",
            )
        weight = weight.contiguous()
        out = torch.empty((rows + 15) // 16, cols, 16, dtype=weight.dtype)
        self.lib.pd_pack(_ptr(weight.data_ptr()), rows, cols, int(weight.dtype == torch.bfloat16), _ptr(out.data_ptr()))
        return Packed(out, rows, cols)

    def linear(
        self,
        x: torch.Tensor,
        weight: Packed,
        bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        add: bool = False,
    ) -> torch.Tensor:
        """x[R, K] W^T (+ bias) → [R, N]; ``add`` adds into ``out``."""
        if x.dtype != torch.float32 or x.shape[1] != weight.cols or x.stride(1) != 1:
            raise ValueError(f"linear: x is {x.dtype} {tuple(x.shape)}, the weight takes float32 [R, {weight.cols}]")
        if out is None:
            out = torch.empty(x.shape[0], weight.rows)
        self.lib.pd_linear(
            self.pool,
            _ptr(x.data_ptr()),
            x.stride(0),
            _ptr(weight.data.data_ptr()),
            int(weight.bf16),
            _ptr(_p(bias)),
            _ptr(out.data_ptr()),
            out.stride(0),
            x.shape[0],
            weight.rows,
            weight.cols,
            int(add),
        )
        return out

    def embed(self, weight: Packed, ids: np.ndarray) -> torch.Tensor:
        """Rows of a packed matrix, [R, K] float32. Ids must be in range."""
        ids = np.ascontiguousarray(ids, np.int32)
        if len(ids) and (ids.min() < 0 or ids.max() >= weight.rows):
            raise ValueError(f"token id out of range 0..{weight.rows - 1}")
        out = torch.empty(len(ids), weight.cols)
        self.lib.pd_embed(
            _ptr(weight.data.data_ptr()),
            int(weight.bf16),
            weight.cols,
            _ptr(ids.ctypes.data),
            len(ids),
            _ptr(out.data_ptr()),
        )
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x[R, H] / rms(x) * weight[H]; H a multiple of 16."""
        out = torch.empty(x.shape[0], x.shape[1])
        self.lib.pd_rms_norm(
            self.pool,
            _ptr(x.data_ptr()),
            x.stride(0),
            _ptr(weight.data_ptr()),
            _ptr(out.data_ptr()),
            x.shape[1],
            x.shape[0],
            x.shape[1],
            _f32(eps),
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [R, 2I] → [R, I]."""
        out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self.lib.pd_silu_mul(self.pool, _ptr(gate_up.data_ptr()), _ptr(out.data_ptr()), out.shape[0], out.shape[1])
        return out

    def rope_store(
        self, qkv: torch.Tensor, rope: Any, batch: ForwardBatch, layer_cache: torch.Tensor, norms: Any = None
    ) -> torch.Tensor:
        """Rotate q and k of qkv[R, (Hq+2Hk)D] in place (after ``norms``, see ops.HeadNorms), store k and v at the rows'
        slots; a view of q [R, Hq, D]."""
        _, _, _, heads, dim = layer_cache.shape
        q_heads = qkv.shape[1] // dim - 2 * heads
        rows, cache = rows_struct(batch), cache_struct(layer_cache)
        self.lib.pd_rope_store(
            self.pool,
            _ptr(qkv.data_ptr()),
            q_heads,
            _ptr(rope.cos.data_ptr()),
            _ptr(rope.sin.data_ptr()),
            _ptr(_p(norms and norms[0])),
            _ptr(_p(norms and norms[1])),
            _f32(norms[2] if norms else 0),
            c.byref(rows),
            c.byref(cache),
        )
        return qkv[:, : q_heads * dim].unflatten(1, (q_heads, dim))

    def attend(self, q: torch.Tensor, batch: ForwardBatch, layer_cache: torch.Tensor) -> torch.Tensor:
        """softmax(q k^T / sqrt(D)) v over each row's prefix and ancestors: q[R, Hq, D] → [R, Hq*D]. Latent KV is both k
        and v, and all query heads share it."""
        if layer_cache.shape[2] == 1 and q.shape[1] > MAX_GROUP:
            parts = [self.attend(part, batch, layer_cache) for part in q.split(MAX_GROUP, 1)]
            return torch.cat(parts, 1)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2])
        rows, cache = rows_struct(batch), cache_struct(layer_cache)
        if self.lib.pd_attend(
            self.pool, _ptr(q.data_ptr()), q.stride(0), q.shape[1], _ptr(out.data_ptr()), c.byref(rows), c.byref(cache)
        ):
            raise MemoryError("attention scores")
        return out

    def pack_heads(self, weight: torch.Tensor) -> list[Packed]:
        """A matrix [N, K] for each head of [heads, N, K]."""
        return [self.pack(matrix.contiguous()) for matrix in weight]

    def per_head(self, x: torch.Tensor, weight: list[Packed]) -> torch.Tensor:
        """x[R, heads, K], each head by its own matrix → [R, heads, N]."""
        out = torch.empty(x.shape[0], len(weight), weight[0].rows)
        for head, matrix in enumerate(weight):
            self.linear(x[:, head], matrix, out=out[:, head])
        return out

    def route(self, logits: torch.Tensor, moe: Moe, bias: torch.Tensor | None) -> tuple[np.ndarray, torch.Tensor]:
        """Experts of each row, best first, and their weights: router logits [R, E] → int32 [R, k], float32 [R, k]."""
        ids = np.empty((len(logits), moe.experts_per_token), np.int32)
        weights = torch.empty(ids.shape)
        rule = RouteStruct(
            moe.num_experts, moe.experts_per_token, moe.groups, moe.groups_per_token, int(moe.scoring == "sigmoid"),
            int(moe.normalise), moe.scaling,
        )
        self.lib.pd_route(
            _ptr(logits.data_ptr()), _ptr(_p(bias)), len(logits), c.byref(rule), _ptr(ids.ctypes.data),
            _ptr(weights.data_ptr()),
        )
        return ids, weights
