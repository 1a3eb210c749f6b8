"""Token ids as little-endian int32 bytes: 32k ids cost microseconds, a repeated protobuf field a millisecond."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from pdspec.errors import InvalidRequest

_INT32 = 4


def ids_to_bytes(ids: Sequence[int]) -> bytes:
    """Little-endian int32. Raises OverflowError for an id outside int32."""
    values = array("i", ids)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def bytes_to_ids(data: bytes, field: str) -> tuple[int, ...]:
    """The ids in ``data``. Raises InvalidRequest naming ``field`` when its length is not a multiple of 4."""
    if len(data) % _INT32:
        remedy = "send ids as little-endian int32, 4 bytes each"
        raise InvalidRequest(f"{len(data)} bytes are no whole number of ids", field=field, remedy=remedy)
    values = array("i")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(values)
