"""KV rounded to int8 on the wire (``wire_kv: int8``): lossy, half the bytes of bfloat16.

A payload of the rows ``start .. start+count-1`` of one layer, in blocks of ``BLOCK`` positions counted from 0, so that
they do not depend on either side's page size; the first and the last one may be cut by the frame::

    [block][k|v][head] float32 scale, little-endian │ [token][k|v][head][dim] int8       value = scale × int8

Each scale is its block's largest magnitude ÷ 127. Ledgers count and hash these bytes, since they are what travels.
"""

from __future__ import annotations

import numpy as np

from pdspec.errors import TransferDamaged
from pdspec.transfer.wireformat import Payload, byte_views
from pdspec.types import CacheGroup

BLOCK = 16
FORMAT = f"int8/{BLOCK}"  # in the fingerprint
_LEVELS = np.float32(127)
_HALF, _ONE = np.uint32(0x7FFF), np.uint32(1)


def encoded_bytes(layout: CacheGroup, start: int, count: int, heads: int) -> int:
    """Size of the payload of ``count`` rows."""
    return heads * layout.parts * (4 * len(_edges(start, count)) + count * layout.head_dim)


def encode(payload: Payload, layout: CacheGroup, start: int, count: int) -> bytes:
    """Rows of all heads, in parts as the pages give them, in ``layout.dtype``. A block with a value that is not finite
    comes out with a NaN for its scale, which ``decode`` refuses."""
    data = np.concatenate([np.frombuffer(view, np.uint8) for view in byte_views(payload)])
    values = _widened(data, layout.dtype).reshape(count, layout.parts, -1, layout.head_dim)
    edges = _edges(start, count)
    largest = np.maximum.reduceat(np.abs(values).max(axis=-1), edges, axis=0)
    scale = np.where(np.isfinite(largest), largest / _LEVELS, np.float32(np.nan))
    factor = np.divide(_LEVELS, largest, out=np.zeros_like(largest), where=np.isfinite(largest) & (scale > 0))
    if not np.isfinite(scale).all():
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    steps = np.rint(values * _per_row(factor, edges, count)).astype(np.int8)
    return scale.astype("<f4").tobytes() + steps.tobytes()


def decode(data: bytes | memoryview, layout: CacheGroup, start: int, count: int, heads: int) -> memoryview:
    """The rows as ``PagedCache.write_rows`` takes them. Raises TransferDamaged for another length and for scales that
    are negative or not finite."""
    size, edges = memoryview(data).nbytes, _edges(start, count)
    if size != encoded_bytes(layout, start, count, heads):
        raise TransferDamaged(f"{size} bytes for {count} rows in {FORMAT}", field=f"pages.{layout.name}")
    split = 4 * len(edges) * layout.parts * heads
    scale = np.frombuffer(data, "<f4", split // 4).reshape(len(edges), layout.parts, heads)
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise TransferDamaged("a scale that is no size", field=f"pages.{layout.name}")
    steps = np.frombuffer(data, np.int8, offset=split).reshape(count, layout.parts, heads, layout.head_dim)
    return _narrowed(steps * _per_row(scale, edges, count), layout.dtype)


def _edges(start: int, count: int) -> np.ndarray:
    """Index of each block's first row among the ``count`` rows."""
    return np.unique(np.r_[0, np.arange(-start % BLOCK, count, BLOCK)])


def _per_row(blocks: np.ndarray, edges: np.ndarray, count: int) -> np.ndarray:
    """[blocks, parts, heads] → [count, parts, heads, 1] float32."""
    return np.repeat(blocks, np.diff(np.r_[edges, count]), axis=0)[..., None].astype(np.float32, copy=False)


def _widened(data: np.ndarray, dtype: str) -> np.ndarray:
    """float32 of raw bytes."""
    if dtype == "float32":
        return data.view(np.float32)
    return (data.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrowed(values: np.ndarray, dtype: str) -> memoryview:
    """Raw bytes of finite float32 values, bfloat16 rounded to the nearest, ties to even."""
    if dtype == "float32":
        return values.data.cast("B")
    bits = values.view(np.uint32)
    rounded = (bits + (_HALF + ((bits >> np.uint32(16)) & _ONE))) >> np.uint32(16)
    return rounded.astype(np.uint16).data.cast("B")
