"""Hashes that say whether two sides hold the same model. All are hex strings of xxh3-128.

They find mistakes (another checkpoint, another tokenizer, other RoPE constants), not malice; a downloaded file is
checked against a pinned SHA-256 before it is converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash

from pdspec.model.config import ModelConfig
from pdspec.model.tensorfile import NUMPY_NAMES, TensorEntry, iterate_bytes
from pdspec.types import CacheGroup


def _hash_json(value: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _hash_tensors(tensors: Iterable[tuple[str, str, tuple[int, ...], memoryview]]) -> str:
    digest = xxhash.xxh3_128()
    for name, dtype, shape, data in tensors:
        digest.update(f"{name} {dtype} {list(shape)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def file_tensors_hash(entries: Mapping[str, TensorEntry]) -> str:
    """Content hash of stored tensors: names, dtypes, shapes and bytes in order of name, however they are split
    into files."""
    return _hash_tensors((name, entry.dtype, entry.shape, data) for name, entry, data in iterate_bytes(entries))


def array_tensors_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """The hash ``file_tensors_hash`` gives once ``tensors`` (uint16 is bfloat16) are written by ``write_tensors``."""
    arrays = ((name, np.ascontiguousarray(tensors[name])) for name in sorted(tensors))
    return _hash_tensors((name, NUMPY_NAMES[one.dtype.name], one.shape, one.data.cast("B")) for name, one in arrays)


def file_hash(path: Path) -> str:
    """Hash of a whole file. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def geometry(config: ModelConfig) -> dict[str, object]:
    """What of ``config`` a draft head must share with its target: all but name, special ids, context, stored dtype.
    Variants that the target has not are left out: heads made before there were any know nothing of them."""
    values = asdict(config)
    for unrelated in ("name", "dtype", "bos_ids", "eos_ids", "max_context"):
        del values[unrelated]
    return {name: value for name, value in values.items() if name not in ("mla", "moe") or value is not None}


def geometry_hash(config: ModelConfig) -> str:
    """Hash of ``geometry``: another value means that a head made for one target cannot serve the other."""
    return _hash_json(geometry(config))


def content_fingerprint(config: ModelConfig, weights_hash: str, dtype: str, groups: Sequence[CacheGroup]) -> str:
    """What both ends of a handoff must share: tensor contents, geometry with RoPE, compute dtype and the cache groups
    (layers, heads, head size, KV dtype). Placement (page size, tensor parallelism) is negotiated and not part of it."""
    return _hash_json(
        {
            "geometry": geometry(config),
            "weights": weights_hash,
            "dtype": dtype,
            "groups": [asdict(group) for group in sorted(groups, key=lambda group: group.name)],
        }
    )
