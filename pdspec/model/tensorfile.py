"""Safetensors files without torch: headers, raw bytes, writing.

The router must know a model's files without paying for torch, and numpy has no bfloat16; so the format (8 bytes of
header length, a JSON header, raw little-endian tensors) is read here directly. bfloat16 travels as uint16 bit patterns.
Source of the format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdspec.errors import CheckpointError

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}
NUMPY_NAMES = {"uint16": "BF16", "float32": "F32"}
REMEDY = "delete the file and fetch or train it again"


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in ``path``: bytes ``[start, stop)`` of the file."""

    path: Path
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name. Raises CheckpointError naming the file if it is cut or garbled."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8:
                raise CheckpointError(f"{path} is cut or no safetensors file", field="model", remedy=REMEDY)
            header = json.loads(file.read(length))
        entries = {
            name: TensorEntry(
                path=path,
                dtype=value["dtype"],
                shape=tuple(int(n) for n in value["shape"]),
                start=8 + length + int(value["data_offsets"][0]),
                stop=8 + length + int(value["data_offsets"][1]),
            )
            for name, value in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}", field="model", remedy=REMEDY) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"the header of {path} is damaged: {error}", field="model", remedy=REMEDY) from error
    for name, entry in entries.items():
        known, wanted = entry.dtype in ITEM_BYTES, ITEM_BYTES.get(entry.dtype, 0) * math.prod(entry.shape)
        if entry.stop > size or entry.start < 8 + length or (known and entry.stop - entry.start != wanted):
            raise CheckpointError(
                f"{path} is truncated or damaged at {name}: bytes {entry.start}..{entry.stop} of {size}",
                field="model",
                remedy=REMEDY,
            )
    return entries


def iterate_bytes(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry, memoryview]]:
    """Each tensor's raw bytes, mapped not copied, in order of name. A view is valid until the next one is asked for."""
    maps: dict[Path, mmap.mmap] = {}
    for name in sorted(entries):
        entry = entries[name]
        if entry.path not in maps:
            with entry.path.open("rb") as file:
                maps[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield name, entry, memoryview(maps[entry.path])[entry.start : entry.stop]


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes uint16 arrays as bfloat16 and float32 arrays as they are, in order of name."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in sorted(tensors):
        array = tensors[name]
        header[name] = {
            "dtype": NUMPY_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).data)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest-even bfloat16, as uint16 bit patterns of the same shape. Values must be finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
