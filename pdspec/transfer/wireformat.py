"""``message PrefillFrame { bytes header = 1; bytes payload = 2; repeated PrefillFrame more = 3; }`` by hand.

The bytes are ordinary protobuf, so that any client can parse them, but our payloads pass through no protobuf
object: one copy on the way out, out of the pages themselves (gRPC wants ``bytes``), none on the way in. Frames that are
ready together travel in one message (``more``), since gRPC's cost is one of messages. Everything is bounded and
whatever does not parse is TransferDamaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgpack

from pdspec.errors import TransferDamaged

MAX_HEADER_BYTES = 256 << 10
MAX_PAYLOAD_BYTES = 24 << 20  # below the transport's message limit (wire.channels.MAX_MESSAGE_BYTES)
MAX_FRAMES = 64  # of one message
_HEADER_TAG, _PAYLOAD_TAG, _MORE_TAG = 0x0A, 0x12, 0x1A  # field << 3 | wire type 2 (length-delimited)
_MAX_VARINT_BYTES = 5  # lengths are below 2^35; ours are far shorter
Payload = bytes | bytearray | memoryview | tuple[memoryview, ...]  # parts that follow one another


def byte_views(payload: Payload) -> tuple[memoryview, ...]:
    """The parts of a payload as flat views."""
    parts = payload if isinstance(payload, tuple) else (payload,)
    return tuple(memoryview(part).cast("B") for part in parts)


def size_of(payload: Payload) -> int:
    """Bytes of a payload."""
    return sum(part.nbytes for part in byte_views(payload))


def one_view(payload: Payload) -> memoryview:
    """The payload as one flat view: of itself where it came in one part, as it does from a peer."""
    parts = byte_views(payload)
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))


def encode_frame(header: dict, payload: Payload = b"") -> bytes:
    """The frame's bytes. A payload's parts are contiguous buffers. Raises TransferDamaged above the size limits."""
    return b"".join(frame_parts(header, payload))


def frame_parts(header: dict, payload: Payload = b"") -> list[bytes | memoryview]:
    """``encode_frame`` before anything is copied."""
    head = msgpack.packb(header, use_bin_type=True)
    size = size_of(payload)
    _bound("header", len(head), MAX_HEADER_BYTES)
    _bound("payload", size, MAX_PAYLOAD_BYTES)
    parts = [bytes((_HEADER_TAG,)), _varint(len(head)), head]
    if size:
        parts += [bytes((_PAYLOAD_TAG,)), _varint(size), *byte_views(payload)]
    return parts


def encode_message(frames: Sequence[list[bytes | memoryview]]) -> bytes:
    """One message of frames in their order, each as ``frame_parts`` gives it: the one copy of their payloads."""
    parts = list(frames[0])
    for frame in frames[1:]:
        parts += [bytes((_MORE_TAG,)), _varint(sum(len(part) for part in frame)), *frame]
    return b"".join(parts)


def decode_frame(data: bytes | memoryview) -> tuple[dict, memoryview]:
    """(header, payload as a view into ``data``). Raises TransferDamaged for anything that is not one such frame."""
    (frame,) = _decode(data, 1)
    return frame


def decode_message(data: bytes | memoryview) -> list[tuple[dict, memoryview]]:
    """The frames of a message, as ``decode_frame`` gives them. Raises TransferDamaged for anything else."""
    return _decode(data, MAX_FRAMES)


def _decode(data: bytes | memoryview, most: int) -> list[tuple[dict, memoryview]]:
    view = memoryview(data).cast("B").toreadonly()
    header, payload = memoryview(b""), memoryview(b"")
    more: list[tuple[dict, memoryview]] = []
    at = 0
    while at < len(view):
        tag = view[at]
        length, at = _read_varint(view, at + 1)
        if length > len(view) - at:
            raise TransferDamaged(f"frame cut short: field of {length} bytes, {len(view) - at} left", field="frame")
        if tag == _HEADER_TAG:
            _bound("header", length, MAX_HEADER_BYTES)
            header = view[at : at + length]
        elif tag == _PAYLOAD_TAG:
            _bound("payload", length, MAX_PAYLOAD_BYTES)
            payload = view[at : at + length]
        elif tag == _MORE_TAG and len(more) + 1 < most:
            more += _decode(view[at : at + length], 1)
        else:
            raise TransferDamaged(f"unknown field tag {tag:#x}, or too many frames", field="frame")
        at += length
    return [(_unpack(header), payload), *more]


def _unpack(header: memoryview) -> dict:
    try:
        values = msgpack.unpackb(header, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise TransferDamaged(f"header is no msgpack map: {error}", field="frame.header") from error
    if not isinstance(values, dict):
        raise TransferDamaged(f"header is a {type(values).__name__}, not a map", field="frame.header")
    return values


def _bound(part: str, length: int, limit: int) -> None:
    if length > limit:
        raise TransferDamaged(f"{length} bytes are above the limit of {limit}", field=f"frame.{part}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(_MAX_VARINT_BYTES):
        if at + shift >= len(view):
            break
        byte = view[at + shift]
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise TransferDamaged("length is cut short or too long", field="frame")
