"""The frames of the Prefill stream (DESIGN 4), typed.

Decode → prefill: Open, Credit, Landed. Prefill → decode, in this order: Begin, then Pages (and HiddenRows) while
the prompt is computed, First as soon as it is known, DraftStart, Done last; Alive in between, ErrorFrame instead of
the rest. Every frame carries the epoch of the reservation it belongs to; frames with a payload also carry ``seq``,
which grows by one, and are counted in a ``Ledger`` on both ends.

``frame.to_bytes()`` and ``parse_frame(data)``; ``parse_message`` where a message may hold several. Headers are msgpack
maps whose first key is ``kind``; what parses is what the dataclass says, to the type and range (``schema.py``), and
everything else is TransferDamaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import xxhash

from pdspec.errors import InvalidRequest, PdspecError, TransferDamaged
from pdspec.transfer.schema import Frame, array_bytes, array_from
from pdspec.transfer.wireformat import Payload, decode_frame, decode_message, size_of
from pdspec.types import GenerateRequest, TokenLogprob
from pdspec.wire.codec import worker_request_from_bytes, worker_request_to_bytes
from pdspec.wire.status import error_from_dict, error_to_dict

WINDOW_BYTES = 32 << 20  # default credit: payload bytes that may be under way
FRAME_BYTES = 2 << 20  # a good payload size: gRPC over loopback is fastest at 1..4 MiB a message
MAX_EXTENT = 1 << 30  # rows, layers, heads: beyond any model, below every integer limit


@dataclass(frozen=True, kw_only=True)
class Open(Frame, kind="open"):
    """D asks for a prefill. ``have_rows`` are the rows per group that D holds already; ``fingerprint`` maps field
    names to content hashes; ``credit`` is the window in payload bytes; ``segment`` offers shared memory."""

    epoch: int
    request: GenerateRequest
    drafter: str
    draft_prefill: str
    have_rows: Mapping[str, int] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    credit: int = WINDOW_BYTES
    worker_id: str = ""
    segment: str = ""  # name:nonce

    def pack(self) -> tuple[dict, bytes]:
        """The request travels as the payload: a serialised WorkerRequest."""
        return self.header("request"), worker_request_to_bytes(self.request)

    @classmethod
    def unpack(cls, header: dict, payload: memoryview) -> Open:
        """Raises TransferDamaged when the payload is no WorkerRequest."""
        try:
            return cls(request=worker_request_from_bytes(payload), **header)
        except InvalidRequest as error:
            raise TransferDamaged(str(error), field="open.request") from error


@dataclass(frozen=True, kw_only=True)
class Credit(Frame, kind="credit"):
    """D has consumed ``bytes`` more payload bytes: P may send as many again."""

    epoch: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Landed(Frame, kind="landed"):
    """D is done with everything up to ``seq``: slots of shared memory are used again, and their bytes are credit."""

    epoch: int
    seq: int


@dataclass(frozen=True, kw_only=True)
class Begin(Frame, kind="begin"):
    """P accepts. ``rows`` per group are those it will have sent by Done, the ``have_rows`` included. ``mover`` is what
    carries the payloads, ``refused`` why it is not the offered memory. ``clock`` names the monotonic clock of Done's
    ``computed_at_s``."""

    epoch: int
    rows: Mapping[str, int]
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    worker_id: str = ""
    mover: str = "grpc"
    refused: str = ""
    clock: str = ""


@dataclass(frozen=True, kw_only=True)
class Alive(Frame, kind="alive"):
    """Nothing to send yet; ``steps`` is P's progress counter. An unchanged one is no progress."""

    epoch: int
    steps: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Pages(Frame, kind="pages"):
    """KV rows ``start .. start+count-1`` of one layer of one group, heads ``head_start .. +head_count-1``;
    payload ``[token][k|v][head][dim]`` in the group's dtype."""

    epoch: int
    seq: int
    group: str
    layer: int
    start: int
    count: int
    head_start: int
    head_count: int
    payload: Payload = b""


@dataclass(frozen=True, kw_only=True)
class First(Frame, kind="first"):
    """t_n, sampled on P; goes to the client at once, before Done can vouch for it, and so carries its own ``check``:
    an xxh3 of the rest, 63 bits, 0 in a frame that is not on the wire."""

    epoch: int
    token_id: int
    logprob: TokenLogprob | None = None
    check: int = 0

    def pack(self) -> tuple[dict, bytes]:
        """``logprob`` travels as [value, [[id, value], ...]]."""
        entry = None
        if self.logprob:
            entry = [float(self.logprob.logprob), [[int(token), float(score)] for token, score in self.logprob.top]]
        header = self.header("logprob", "check") | {"logprob": entry}
        return {**header, "check": _digest(header)}, b""

    @classmethod
    def unpack(cls, header: dict, payload: memoryview) -> First:
        """Raises TransferDamaged for another shape of ``logprob`` or a wrong ``check``."""
        check, entry = header.pop("check", 0), header.get("logprob")
        logprob = None
        match entry:
            case None:
                pass
            case [float(value), [*pairs]] if all(_is_pair(pair) for pair in pairs):
                top = tuple((token, score) for token, score in pairs)
                logprob = TokenLogprob(token_id=header["token_id"], logprob=value, top=top)
            case _:
                raise TransferDamaged("not [value, [[id, value], ...]]", field="first.logprob")
        if check != _digest({"kind": cls.kind, "logprob": None, **header}):
            raise TransferDamaged("the frame is not what was sent", field="first.check")
        return cls(**{**header, "logprob": logprob})


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftStart(Frame, kind="draft_start"):
    """The drafter's start: W first candidates (ids int32, log q and score float32, all [W]) and its named float32
    rows, e.g. ``{"hidden": [H]}``; rows are copies of the payload's parts."""

    epoch: int
    seq: int
    token_ids: np.ndarray
    log_q: np.ndarray
    score: np.ndarray
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)

    def pack(self) -> tuple[dict, bytes]:
        """Arrays of [W] in the header, rows one after the other in the payload, their shapes in the header."""
        arrays = {name: array_bytes(getattr(self, name), kind) for name, kind in _START_ARRAYS}
        shapes = {name: list(row.shape) for name, row in self.rows.items()}
        payload = b"".join(array_bytes(row, "<f4") for row in self.rows.values())
        return {**self.header("rows", *arrays), **arrays, "rows": shapes}, payload

    @classmethod
    def unpack(cls, header: dict, payload: memoryview) -> DraftStart:
        """Raises TransferDamaged when lengths and shapes do not agree."""
        arrays: dict[str, Any] = {}
        for name, kind in _START_ARRAYS:
            arrays[name] = array_from(header.pop(name), kind, None, f"draft_start.{name}")
        if len({len(values) for values in arrays.values()}) != 1:
            raise TransferDamaged("token_ids, log_q and score differ in length", field="draft_start.token_ids")
        shapes, rows, at = header.pop("rows", {}), {}, 0
        for name, shape in shapes.items():
            size = 4 * int(np.prod(shape, dtype=np.int64))
            rows[name] = array_from(payload[at : at + size], "<f4", shape, f"draft_start.rows[{name}]")
            at += size
        if at != len(payload):
            raise TransferDamaged(f"{len(payload)} payload bytes for {at} declared", field="draft_start.rows")
        return cls(**header, **arrays, rows=rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenRows(Frame, kind="hidden"):
    """``draft_prefill: decode``: target hidden rows ``start .. start+count-1`` that the drafter reads, payload
    ``[row][...]`` in ``dtype``; what a row holds is the drafter's affair. Counted in the ledger as "hidden"."""

    epoch: int
    seq: int
    start: int
    count: int
    dtype: str  # "bfloat16" | "float32"
    payload: Payload = b""


@dataclass(frozen=True, kw_only=True)
class Done(Frame, kind="done"):
    """The last frame. Per group what the sender's ledger holds: payload ``bytes``, frame ``rows`` and ``xxh3``;
    ``stats`` are P's own times and counts (``queue_ms``, ``prefill_ms``, ...)."""

    epoch: int
    bytes: Mapping[str, int]
    rows: Mapping[str, int]
    xxh3: Mapping[str, int]
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ErrorFrame(Frame, kind="error"):
    """P gives up; ``error`` is ``wire.status.error_to_dict`` of a typed error."""

    epoch: int
    error: Mapping[str, str | int]

    @classmethod
    def of(cls, epoch: int, error: PdspecError) -> ErrorFrame:
        """The frame that says ``error``."""
        return cls(epoch=epoch, error=error_to_dict(error))

    def to_error(self) -> PdspecError:
        """The typed error to raise on the other side."""
        try:
            return error_from_dict(dict(self.error))
        except ValueError as error:
            return TransferDamaged(str(error), field="error")


DATA_FRAMES = (Pages, HiddenRows, DraftStart)
_START_ARRAYS = (("token_ids", "<i4"), ("log_q", "<f4"), ("score", "<f4"))


def parse_frame(data: bytes | memoryview) -> Frame:
    """The typed frame. Payloads are views into ``data``. Raises TransferDamaged, whatever ``data`` is."""
    header, payload = decode_frame(data)
    return Frame.parse(header, payload)


def parse_message(data: bytes | memoryview) -> list[Frame]:
    """The typed frames of one message, which may hold several. As ``parse_frame``."""
    return [Frame.parse(header, payload) for header, payload in decode_message(data)]


def _digest(header: dict) -> int:
    """63 bits over a header, whatever the order of its keys."""
    return xxhash.xxh3_64_intdigest(msgpack.packb(sorted(header.items()))) >> 1


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and type(pair[1]) is float


def payload_bytes(frame: Frame) -> int:
    """What ``frame`` counts against the credit window."""
    match frame:
        case Pages() | HiddenRows():
            return size_of(frame.payload)
        case DraftStart():
            return sum(row.nbytes for row in frame.rows.values())
    return 0
