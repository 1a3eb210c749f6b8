"""What a frame's header may hold: the dataclass's annotations, checked to the type and range on parsing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Self

import numpy as np

from pdspec.errors import TransferDamaged
from pdspec.transfer.wireformat import Payload, encode_frame

_INT64, _UINT64 = 1 << 63, 1 << 64
_MAX_NAMES = 1024  # entries of one map
_MAX_ROW_DIMS = 4


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _INT64


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_shape(value: Any) -> bool:
    small = isinstance(value, list) and len(value) <= _MAX_ROW_DIMS
    return small and all(type(size) is int and 0 <= size < 1 << 24 for size in value)


def _map_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_map(value: Any) -> bool:
        if not isinstance(value, dict) or len(value) > _MAX_NAMES:
            return False
        return all(isinstance(name, str) and check(entry) for name, entry in value.items())

    return is_map


_BY_ANNOTATION: dict[str, Callable[[Any], bool]] = {
    "int": _is_count,
    "str": _is_text,
    "np.ndarray": lambda value: isinstance(value, bytes),
    "TokenLogprob | None": lambda value: value is None or isinstance(value, list),
    "Mapping[str, int]": _map_of(lambda value: type(value) is int and 0 <= value < _UINT64),
    "Mapping[str, str]": _map_of(_is_text),
    "Mapping[str, float]": _map_of(_is_number),
    "Mapping[str, str | int]": _map_of(lambda value: _is_text(value) or type(value) is int),
    "Mapping[str, np.ndarray]": _map_of(_is_shape),
}
_IN_PAYLOAD = {"Payload", "GenerateRequest"}
_RANGES: dict[str, tuple[int, int]] = {  # inclusive, exclusive
    "layer": (0, 1 << 16),
    "start": (0, 1 << 30),
    "count": (1, 1 << 30),
    "head_start": (0, 1 << 16),
    "head_count": (1, 1 << 16),
    "token_id": (0, 1 << 31),
}


class Frame:
    """Base of the frames: registers each subclass under its ``kind`` and turns it into bytes and back."""

    kinds: ClassVar[dict[str, type[Frame]]] = {}
    kind: ClassVar[str]
    epoch: int

    def __init_subclass__(cls, kind: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = kind
        Frame.kinds[kind] = cls

    def header(self, *without: str) -> dict[str, Any]:
        """The header's map, ``kind`` first, but for the fields that stand in the payload or in ``without``."""
        named = (f for f in fields(self) if f.type not in _IN_PAYLOAD and f.name not in without)  # type: ignore[arg-type]
        return {"kind": self.kind} | {f.name: _plain(getattr(self, f.name)) for f in named}

    def pack(self) -> tuple[dict, Payload]:
        """(header, payload)."""
        return self.header(), getattr(self, "payload", b"")

    def to_bytes(self) -> bytes:
        """The frame on the wire. Raises TransferDamaged above the size limits."""
        return encode_frame(*self.pack())

    @classmethod
    def unpack(cls, header: dict, payload: memoryview) -> Self:
        """The reverse of ``pack``, after ``header`` was checked and ``kind`` taken out."""
        if any(f.name == "payload" for f in fields(cls)):  # type: ignore[arg-type]
            return cls(**header, payload=payload)  # type: ignore[call-arg]
        if len(payload):
            raise TransferDamaged(f"{len(payload)} bytes of payload in a frame that has none", field=cls.kind)
        return cls(**header)

    @staticmethod
    def parse(header: dict, payload: memoryview) -> Frame:
        """The typed frame. Raises TransferDamaged naming kind and field."""
        kind = header.get("kind")
        if not isinstance(kind, str) or next(iter(header)) != "kind" or kind not in Frame.kinds:
            raise TransferDamaged(f"unknown frame kind {str(kind)[:40]!r}", field="frame.kind")
        cls = Frame.kinds[kind]
        values = {name: value for name, value in header.items() if name != "kind"}
        _check(cls, values)
        return cls.unpack(values, payload)


def array_bytes(values: np.ndarray, kind: str) -> bytes:
    """``values`` as contiguous little-endian bytes of ``kind`` ("<i4", "<f4")."""
    return np.ascontiguousarray(values, dtype=kind).tobytes()


def array_from(data: bytes | memoryview, kind: str, shape: list[int] | None, field: str) -> np.ndarray:
    """A writable copy. Raises TransferDamaged naming ``field`` when the length does not fit."""
    size = np.dtype(kind).itemsize
    if len(data) % size or (shape is not None and math.prod(shape) * size != len(data)):
        raise TransferDamaged(f"{len(data)} bytes for {kind} of shape {shape}", field=field)
    values = np.frombuffer(data, dtype=kind).copy()
    return values if shape is None else values.reshape(shape)


def _check(cls: type[Frame], values: dict[str, Any]) -> None:
    known = {f.name: f for f in fields(cls) if f.type not in _IN_PAYLOAD}  # type: ignore[arg-type]
    for name in values.keys() - known.keys():
        raise TransferDamaged("unknown field", field=f"{cls.kind}.{name[:40]}")
    for name, f in known.items():
        if name not in values:
            if f.default is MISSING and f.default_factory is MISSING:
                raise TransferDamaged("missing", field=f"{cls.kind}.{name}")
            continue
        value = values[name]
        if not _BY_ANNOTATION[str(f.type)](value):
            raise TransferDamaged(f"{str(value)[:80]!r} is no {f.type}", field=f"{cls.kind}.{name}")
        low, high = _RANGES.get(name, (0, _INT64))
        if type(value) is int and not low <= value < high:
            raise TransferDamaged(f"{value} is outside [{low}, {high})", field=f"{cls.kind}.{name}")


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value
