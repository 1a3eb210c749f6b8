"""Parquet tables of a study (pyarrow, the optional extra ``study``)."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdspec.errors import ConfigError
from pdspec.study.cells.grid import Cell, StudyConfig
from pdspec.study.cells.measures import measures
from pdspec.study.cells.store import Store


def needed(module: str) -> Any:
    """An optional package. Raises ConfigError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        remedy = "pip install 'pdspec[study]'"
        raise ConfigError(f"{package} is not installed", field="study", remedy=remedy) from error


def write(store: Store, study: StudyConfig, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """``requests.parquet`` and ``cells.parquet`` of the cells that are complete; the rows of the latter."""
    requests: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for cell in cells:
        if not store.has(cell):
            continue
        rows = store.rows(cell)
        requests += rows
        found = measures(
            rows, store.spent(cell), ttft_ms=study.slo.ttft_ms, tpot_ms=study.slo.tpot_ms,
            price_per_hour=study.price_per_hour,
        )  # fmt: skip
        table.append({"cell": cell.id, "pd": cell.pd, **dataclasses.asdict(cell), **found})
    _write(store.folder / "requests.parquet", requests)
    _write(store.folder / "cells.parquet", table)
    return table


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table. Raises ConfigError."""
    parquet = needed("pyarrow.parquet")
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except OSError as error:
        remedy = "run `pdspec study run` to its end"
        raise ConfigError(f"cannot read {path}: {error}", field="DIR", remedy=remedy) from error
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow, parquet = needed("pyarrow"), needed("pyarrow.parquet")
    fresh = path.with_name(f".{path.name}")
    names = list(dict.fromkeys(name for row in rows for name in row))  # rows of older versions have fewer
    whole = [{name: row.get(name) for name in names} for row in rows]
    parquet.write_table(arrow.Table.from_pylist(whole), fresh)
    os.replace(fresh, path)
