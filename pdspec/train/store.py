"""Samples on disk: a folder of append-only files that a killed run leaves whole.

    meta.json       what wrote it: model, hashes, temperature, captured layers
    samples.jsonl   one line per sample: index, source, prompt_tokens, tokens, key; written last
    tokens.i32      token ids of all samples, one after the other
    best.i32        the target's best token after each row, -1 where it was not computed
    hidden.bf16     optional [rows, C+1, H]: captured layer inputs, then the state after the final norm

Row i belongs to token t_i. The last row of a sample was never run: best -1, hidden zero.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pdspec.errors import ConfigError

SAMPLES, TOKENS, BEST, HIDDEN, META = "samples.jsonl", "tokens.i32", "best.i32", "hidden.bf16", "meta.json"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation: prompt then answer. ``hidden`` are bfloat16 bit patterns [N, C+1, H] or None.

    ``index`` is the sample's place in the generation plan, ``key`` a hash of its user turn."""

    index: int
    source: str
    prompt_tokens: int
    key: str
    tokens: np.ndarray  # [N] int32
    best: np.ndarray  # [N] int32
    hidden: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class _Entry:
    index: int
    source: str
    prompt_tokens: int
    tokens: int
    key: str
    start: int


class TokenStore:
    """Opens or creates ``folder``. ``meta`` must equal what the folder was made with; raises ConfigError if not.

    A partly written sample at the end (a killed run) is cut off when opened for writing.
    """

    def __init__(self, folder: str | Path, meta: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.writable = meta is not None
        self.meta = self._open_meta(meta)
        self.row_shape: tuple[int, ...] = tuple(self.meta.get("hidden_row", ()))
        self._entries = self._read_index()
        if self.writable:
            self._cut(sum(entry.tokens for entry in self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_hidden(self) -> bool:
        """Whether hidden rows are stored."""
        return bool(self.row_shape)

    @property
    def indices(self) -> set[int]:
        """Plan indices of the samples that are there."""
        return {entry.index for entry in self._entries}

    @property
    def keys(self) -> set[str]:
        """Hashes of the user turns that are there."""
        return {entry.key for entry in self._entries}

    def answer_tokens(self) -> Counter[str]:
        """Target-written answer tokens by source."""
        counts: Counter[str] = Counter()
        for entry in self._entries:
            counts[entry.source] += entry.tokens - entry.prompt_tokens
        return counts

    def samples_by_source(self) -> Counter[str]:
        """Samples by source."""
        return Counter(entry.source for entry in self._entries)

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, tokens) of every sample in order."""
        return [(entry.prompt_tokens, entry.tokens) for entry in self._entries]

    def append(self, sample: Sample) -> None:
        """Adds one sample; its index line is written last, so that a cut is seen."""
        self._append(TOKENS, np.ascontiguousarray(sample.tokens, np.int32))
        self._append(BEST, np.ascontiguousarray(sample.best, np.int32))
        if self.row_shape:
            if sample.hidden is None or sample.hidden.shape != (len(sample.tokens), *self.row_shape):
                raise ValueError(
                    f"hidden rows {None if sample.hidden is None else sample.hidden.shape}, "
                    f"wanted {(len(sample.tokens), *self.row_shape)}"
                )
            self._append(HIDDEN, np.ascontiguousarray(sample.hidden, np.uint16))
        record: dict[str, Any] = {
            "index": sample.index,
            "source": sample.source,
            "prompt_tokens": sample.prompt_tokens,
            "tokens": len(sample.tokens),
            "key": sample.key,
        }
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        last = self._entries[-1] if self._entries else None
        start = last.start + last.tokens if last else 0
        self._entries.append(_Entry(start=start, **record))

    def read(self, number: int, *, hidden_rows: bool = True) -> Sample:
        """Sample ``number`` in order of writing, with hidden rows where they are stored and wanted."""
        entry = self._entries[number]
        hidden = None
        if self.row_shape and hidden_rows:
            width = int(np.prod(self.row_shape))
            flat = self._slice(HIDDEN, np.uint16, entry.start * width, entry.tokens * width)
            hidden = flat.reshape(entry.tokens, *self.row_shape)
        return Sample(
            index=entry.index,
            source=entry.source,
            prompt_tokens=entry.prompt_tokens,
            key=entry.key,
            tokens=self._slice(TOKENS, np.int32, entry.start, entry.tokens),
            best=self._slice(BEST, np.int32, entry.start, entry.tokens),
            hidden=hidden,
        )

    def read_all(self, *, hidden_rows: bool = True) -> Iterable[Sample]:
        """Every sample, in order of writing; see ``read``."""
        return (self.read(number, hidden_rows=hidden_rows) for number in range(len(self)))

    def _open_meta(self, meta: dict[str, Any] | None) -> dict[str, Any]:
        path = self.folder / META
        if meta is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        if not path.exists():
            raise ConfigError(f"{self.folder} holds no samples", field="data", remedy="generate some first")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted({*found, *(meta or {})}) if meta is not None else ():
            if found.get(key) != (meta or {}).get(key):
                raise ConfigError(
                    f"{self.folder} was written with {key}={found.get(key)!r}, not {(meta or {}).get(key)!r}",
                    field="data",
                    remedy="name another folder, or the settings it was made with",
                )
        return found

    def _read_index(self) -> list[_Entry]:
        path = self.folder / SAMPLES
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.split("\n")[:-1]  # what follows the last line end is a cut line
        entries: list[_Entry] = []
        start = 0
        for line in lines:
            entry = _Entry(start=start, **json.loads(line))
            entries.append(entry)
            start += entry.tokens
        return entries

    def _cut(self, rows: int) -> None:
        sizes = {
            TOKENS: 4 * rows,
            BEST: 4 * rows,
            HIDDEN: 2 * rows * int(np.prod(self.row_shape)) if self.row_shape else 0,
        }
        for name, size in sizes.items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else 0
            if found < size:
                raise ConfigError(
                    f"{path} has {found} bytes, {size} expected", field="data", remedy="delete the folder"
                )
            if found > size:
                with path.open("r+b") as file:
                    file.truncate(size)
        index = self.folder / SAMPLES
        if index.exists():
            text = index.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                index.write_text(whole, encoding="utf-8")

    def _append(self, name: str, array: np.ndarray) -> None:
        with (self.folder / name).open("ab") as file:
            file.write(array.data)

    def _slice(self, name: str, dtype: type, start: int, count: int) -> np.ndarray:
        item = np.dtype(dtype).itemsize
        return np.fromfile(self.folder / name, dtype=dtype, count=count, offset=start * item)


def data_counts(stores: Sequence[TokenStore]) -> dict[str, dict[str, Any]]:
    """Samples and answer tokens by source, and its share of the answer tokens."""
    counts: dict[str, dict[str, Any]] = {}
    for store in stores:
        tokens = store.answer_tokens()
        for name, samples in store.samples_by_source().items():
            one = counts.setdefault(name, {"samples": 0, "answer_tokens": 0})
            one["samples"] += samples
            one["answer_tokens"] += tokens[name]
    whole = max(1, sum(one["answer_tokens"] for one in counts.values()))
    for one in counts.values():
        one["share"] = round(one["answer_tokens"] / whole, 4)
    return counts
