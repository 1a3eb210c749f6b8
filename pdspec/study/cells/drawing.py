"""How the pictures of a report are drawn (matplotlib, the extra ``study``): colour says the drafter, line style the
topology, in all of them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdspec.study.cells.tables import needed

Row = Mapping[str, Any]
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """``columns`` of ``table``, rows of ``cells``; ``svg`` is an element, without a prolog."""

    name: str
    title: str
    caption: str
    table: str
    columns: tuple[str, ...]
    cells: tuple[str, ...]
    svg: str
    png: bytes


class Series:
    """How cells are named and drawn: only what differs within the study is said."""

    def __init__(self, cells: Sequence[Row]) -> None:
        self.cells = cells
        self._several = [key for key in ("model", "pd", "handoff") if len({row[key] for row in cells} - {""}) > 1]
        self._places = list(dict.fromkeys(self.place(row) for row in cells))
        self._drafters = list(dict.fromkeys(self.drafter(row) for row in cells))

    def place(self, row: Row) -> str:
        """Model, topology and handoff."""
        return " ".join(row[key] for key in self._several if row[key]) or row["pd"]

    def drafter(self, row: Row) -> str:
        """With its tree where the study has the drafter with several."""
        trees = {other["tree"] for other in self.cells if other["drafter"] == row["drafter"]}
        return f"{row['drafter']} {row['tree']}" if len(trees) > 1 else row["drafter"]

    def label(self, row: Row) -> str:
        """Of a line."""
        return f"{self.place(row)} {self.drafter(row)}"

    def grouped(self, key: Callable[[Row], str]) -> dict[str, list[Row]]:
        """Cells by ``key``, in order."""
        found: dict[str, list[Row]] = {}
        for row in self.cells:
            found.setdefault(key(row), []).append(row)
        return found

    def look(self, row: Row) -> dict[str, Any]:
        """Keywords of a plot."""
        place = self._places.index(self.place(row))
        return {"color": self.colour(row), "linestyle": _STYLES[place % len(_STYLES)]}

    def colour(self, row: Row) -> str:
        """Of its drafter."""
        return f"C{self._drafters.index(self.drafter(row)) % 10}"

    def marker(self, row: Row) -> str:
        """Of its topology."""
        return _MARKERS[self._places.index(self.place(row)) % len(_MARKERS)]


def panels(count: int) -> tuple[Any, Any]:
    """A figure and its axes, side by side."""
    figure = needed("matplotlib.figure").Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def whole_numbers(axis: Any) -> None:
    """Ticks at nothing else."""
    axis.set_major_locator(needed("matplotlib.ticker").MaxNLocator(integer=True, min_n_ticks=1))


def picture(
    figure: Any, name: str, title: str, caption: str, table: str, cells: Sequence[Row], columns: tuple[str, ...]
) -> Picture:
    """``figure`` as SVG and PNG, with what it was made from."""
    matplotlib = needed("matplotlib")
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=120)
    return Picture(
        name=name, title=title, caption=caption, table=table, columns=columns,
        cells=tuple(row["cell"] for row in cells), svg=_element(svg.getvalue()), png=png.getvalue(),
    )  # fmt: skip


def _element(svg: str) -> str:
    """Without prolog and metadata, which name other sites, and without group ids, which all pictures share."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    return re.sub(r'<g id="[^"]*"', "<g", svg)
