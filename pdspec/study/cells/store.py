"""The folder of a study: what is measured stays, whatever happens to the process that measures.

study.json             cells and their values, versions, hardware
cells/<id>.jsonl       the requests of a cell that is complete; lines without an index say what it took as a whole
cells/.<id>.partial    of one that is being measured; a killed study leaves one, the next run begins that cell anew
requests.parquet       all rows of the study's cells
cells.parquet          one row per cell: its values and measures
.lock                  held while a study runs
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdspec.errors import ConfigError
from pdspec.study.cells.client import Row
from pdspec.study.cells.grid import Cell, StudyConfig
from pdspec.telemetry import hardware, versions


class Store:
    """``folder`` is made where it is missing. Raises ConfigError."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """One study at a time writes here. Raises ConfigError."""
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115  closed below
        except OSError as error:
            remedy = "name a folder that can be written with --out"
            raise ConfigError(f"cannot write {self.folder}: {error.strerror}", field="--out", remedy=remedy) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                message = f"another study runs in {self.folder}"
                raise ConfigError(message, field="--out", remedy="wait for it, or name another folder") from error
            yield

    def path(self, cell: Cell) -> Path:
        """Of its rows."""
        return self.folder / "cells" / f"{cell.id}.jsonl"

    def has(self, cell: Cell) -> bool:
        """Whether it is complete."""
        return self.path(cell).exists()

    def rows(self, cell: Cell) -> list[Row]:
        """Of a complete cell, in order of the requests."""
        return sorted((row for row in self._lines(cell) if "index" in row), key=lambda row: row["index"])

    def spent(self, cell: Cell) -> Row:
        """What a complete cell took as a whole (``run.measure``); empty where nobody noted it."""
        return {key: value for row in self._lines(cell) if "index" not in row for key, value in row.items()}

    def _lines(self, cell: Cell) -> list[Row]:
        with self.path(cell).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    @contextmanager
    def writing(self, cell: Cell) -> Iterator[Callable[[Row], None]]:
        """A cell's rows, one call each, and, without ``index``, what it took as a whole. They count when the block ends
        without an error, all at once."""
        partial = self.folder / "cells" / f".{cell.id}.partial"
        with partial.open("w", encoding="utf-8") as file:

            def write(row: Row) -> None:
                file.write(json.dumps({"cell": cell.id, **row}, allow_nan=False) + "\n")
                file.flush()

            yield write
            os.fsync(file.fileno())
        os.replace(partial, self.path(cell))

    def describe(self, study: StudyConfig, cells: Sequence[Cell]) -> int:
        """Write study.json, whole or not at all. How many different machines or sets of versions ran this study so far,
        this one with them: they are kept in ``runs``."""
        now = {"hardware": hardware(), "versions": versions()}
        path = self.folder / "study.json"
        runs = [*(described(self.folder).get("runs", ()) if path.exists() else ()), now]
        runs = [run for place, run in enumerate(runs) if run not in runs[:place]]
        listed = [{"cell": cell.id, **dataclasses.asdict(cell)} for cell in cells]
        whole = {"study": study.to_mapping(), "cells": listed, **now, "runs": runs}
        fresh = self.folder / ".study.json"
        fresh.write_text(json.dumps(whole, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(fresh, path)
        return len(runs)


def described(folder: Path) -> Mapping[str, Any]:
    """study.json of a folder. Raises ConfigError where there is none."""
    try:
        found: Mapping[str, Any] = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "name the folder that `pdspec study run --out` wrote"
        raise ConfigError(f"{folder} holds no study: {error}", field="DIR", remedy=remedy) from error
    return found
