"""The pictures of a report, each with the cells and columns that it was made from (matplotlib, the extra ``study``).

Colour says the drafter, line style the topology, in all of them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdspec.study.cells.measures import BIN, acceptance, per_position, tpot
from pdspec.study.cells.tables import needed
from pdspec.study.plan.closed import expected_tokens

Row = Mapping[str, Any]
_STYLES = ("-", "--", ":", "-.")
_CHAIN = re.compile(r"chain\((\d+)\)")
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


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (throughput, latency): those that no other point beats in both, by throughput."""
    best, found = float("inf"), []
    for rate, latency in sorted(points, key=lambda one: (-one[0], one[1])):
        if latency < best:
            best = latency
            found.append((rate, latency))
    return found[::-1]


def pictures(cells: Sequence[Row], requests: Sequence[Row]) -> list[Picture]:
    """All that the rows allow, cells where everything was refused left out. Raises ConfigError without matplotlib."""
    able = [row for row in cells if row["output_tokens"]]
    answered = [row for row in requests if not row["error"]]
    if not able:
        return []
    series = Series(able)
    found = [_pareto(series), _cdfs(series, answered), _timeline(series, answered), _topologies(series)]
    if any(row["acceptance_per_position"] for row in able):
        found[3:3] = [_along(series, answered), _positions(series, answered)]
    return found


def _pareto(series: Series) -> Picture:
    figure, (axes,) = _panels(1)
    for label, rows in series.grouped(series.label).items():
        points = [(row["tokens_per_second"], row["tpot_ms_p50"]) for row in rows]
        axes.plot(*zip(*points, strict=True), label=label, marker=series.marker(rows[0]), **series.look(rows[0]))
    best = front((row["tokens_per_second"], row["tpot_ms_p50"]) for row in series.cells)
    axes.plot(*zip(*best, strict=True), color="black", linewidth=5, alpha=0.15, label="Pareto front", zorder=0)
    axes.set(xlabel="output tokens per second, all requests", ylabel="time per output token, P50 (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = "Each point is a cell, a line joins the loads of one setting. Down and to the right is better."
    return _picture(
        figure, "pareto", "Latency and throughput", caption, "cells.parquet", series.cells,
        ("pd", "handoff", "drafter", "tree", "load", "tokens_per_second", "tpot_ms_p50"),
    )  # fmt: skip


def _cdfs(series: Series, requests: Sequence[Row]) -> Picture:
    load = max(series.cells, key=lambda row: row["span_s"] and row["output_tokens"] / row["span_s"])["load"]
    chosen = [row for row in series.cells if row["load"] == load]
    figure, axes = _panels(2)
    for row in chosen:
        own = [one for one in requests if one["cell"] == row["cell"]]
        for panel, values in zip(axes, ([one["ttft_ms"] for one in own], [tpot(one) for one in own]), strict=True):
            panel.ecdf(values, label=series.label(row), **series.look(row))
    axes[0].set(xlabel="time to first token (ms)", ylabel="share of requests")
    axes[1].set(xlabel="time per output token (ms)")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = f"Requests of the cells under “{load}”, the load with the highest throughput."
    return _picture(
        figure, "cdf", "Distribution of latencies", caption, "requests.parquet", chosen,
        ("cell", "ttft_ms", "total_ms", "output_tokens"),
    )  # fmt: skip


def _timeline(series: Series, requests: Sequence[Row]) -> Picture:
    chosen = max(series.cells, key=lambda row: (row["prefill"] > 0, row["tokens_per_second"]))
    figure, (axes,) = _panels(1)
    own = sorted((one for one in requests if one["cell"] == chosen["cell"]), key=lambda one: one["asked_s"])
    for place, one in enumerate(own):
        first, whole = one["ttft_ms"] / 1e3, one["total_ms"] / 1e3
        axes.barh(place, first, left=one["asked_s"], color="0.75", label="" if place else "to the first token")
        axes.barh(place, whole - first, left=one["asked_s"] + first, color=series.colour(chosen), alpha=0.45,
                  label="" if place else "decoding")  # fmt: skip
        moments = [one["asked_s"] + when / 1e3 for when in one["piece_ms"]]
        axes.plot(moments, [place] * len(moments), "|", color="black", markersize=5, markeredgewidth=0.4,
                  label="" if place else "a verification's tokens arrive")  # fmt: skip
    axes.set(xlabel="seconds since the first request", ylabel="request")
    _whole(axes.yaxis)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3)
    caption = f"One run, {series.label(chosen)}, {chosen['load']}: the disaggregated cell with the highest throughput."
    if not chosen["prefill"]:
        caption = f"One run, {series.label(chosen)}, {chosen['load']}: the cell with the highest throughput."
    return _picture(
        figure, "timeline", "Timeline of one run", caption, "requests.parquet", [chosen],
        ("cell", "asked_s", "ttft_ms", "total_ms", "piece_ms"),
    )  # fmt: skip


def _along(series: Series, requests: Sequence[Row]) -> Picture:
    drafting = [row for row in series.cells if row["acceptance_per_position"]]
    figure, axes = _panels(2)
    for place, (name, rows) in enumerate(Series(drafting).grouped(series.drafter).items()):
        ids = {row["cell"] for row in rows}
        found = acceptance([one for one in requests if one["cell"] in ids])
        curve = [float("nan") if one is None else one for one in found["acceptance_along"]]
        colour = series.colour(rows[0])
        axes[0].plot([BIN * (n + 0.5) for n in range(len(curve))], curve, label=name, color=colour, marker=".")
        for shift, key, alpha in ((-0.2, "acceptance_length", 1.0), (0.2, "acceptance_length_not_repeated", 0.5)):
            height = found[key] or 0.0
            axes[1].bar(place + shift, height, 0.38, color=colour, alpha=alpha)
            axes[1].text(place + shift, height, f"{height:.2f}", ha="center", va="bottom", fontsize=7)
    axes[0].set(xlabel=f"place in the answer (tokens, bins of {BIN})", ylabel="tokens per verification")
    axes[0].set_ylim(bottom=0.95)
    axes[0].legend(fontsize=7)
    names = list(Series(drafting).grouped(series.drafter))
    axes[1].set_xticks(range(len(names)), names)
    axes[1].set(ylabel="tokens per verification", xlabel="all (solid), outside repeated 8-grams (pale)")
    caption = (
        "Tokens per verification along the answers, all cells of a drafter together; at the right over all answers, "
        "and for the verifications that begin outside 8-grams which the answer had before."
    )
    return _picture(
        figure, "acceptance", "Acceptance along the answers", caption, "requests.parquet", drafting,
        ("cell", "token_ids", "piece_tokens", "output_tokens", "verifications"),
    )  # fmt: skip


def _positions(series: Series, requests: Sequence[Row]) -> Picture:
    drafting = [row for row in series.cells if row["acceptance_per_position"]]
    figure, axes = _panels(2)
    _whole(axes[0].xaxis)
    largest = 1.0
    for label, rows in Series(drafting).grouped(series.label).items():
        ids = {row["cell"] for row in rows}
        own = [one for one in requests if one["cell"] in ids]
        shares = per_position(own)
        axes[0].plot(range(1, len(shares) + 1), shares, label=label, marker=".", **series.look(rows[0]))
        if kind := _CHAIN.fullmatch(rows[0]["tree"]):
            form = expected_tokens(min(1.0, shares[0]), int(kind[1]))
            measured = acceptance(own)["acceptance_length"]
            axes[1].plot(form, measured, series.marker(rows[0]), color=series.colour(rows[0]))
            largest = max(largest, form, measured)
    axes[0].set(xlabel="depth of the draft", ylabel="accepted, of those reached", ylim=(0, 1.02))
    axes[1].plot([1, 1.05 * largest], [1, 1.05 * largest], color="0.6", linewidth=0.8)
    axes[1].set(xlabel="predicted: (1 − α^(K+1)) / (1 − α)", ylabel="measured tokens per verification")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    caption = (
        "Left: how often the draft at a depth was accepted where all before it were. Right: the closed form of a chain "
        "of K drafts with α of depth 1, against what was measured; below the line, later depths are worth less than "
        "the first, or fewer than K were drafted. Trees that are no chains are not in it."
    )
    return _picture(
        figure, "positions", "Acceptance per position, measured and predicted", caption, "requests.parquet", drafting,
        ("cell", "accepted_per_position", "reached_per_position", "output_tokens", "verifications"),
    )  # fmt: skip


def _topologies(series: Series) -> Picture:
    figure, axes = _panels(3)
    loads = list(dict.fromkeys(row["load"] for row in series.cells))
    groups = series.grouped(series.label)
    for place, (label, rows) in enumerate(groups.items()):
        hatch = "//" if rows[0]["prefill"] else ""
        at = {row["load"]: row for row in rows}
        for panel, key in zip(axes, ("tokens_per_second", "tpot_ms_p50", "ttft_ms_p50"), strict=True):
            shown = [n for n, load in enumerate(loads) if load in at]
            panel.bar([n + 0.85 * (place + 0.5) / len(groups) - 0.425 for n in shown],
                      [at[loads[n]][key] for n in shown], 0.8 / len(groups), color=series.colour(rows[0]),
                      hatch=hatch, edgecolor="white", linewidth=0.3, label=label)  # fmt: skip
    for panel, name in zip(axes, ("tokens per second", "per token, P50 (ms)", "first token, P50 (ms)"), strict=True):
        panel.set_xticks(range(len(loads)), loads, rotation=15, fontsize=7)
        panel.set_title(name, fontsize=9)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = "Every topology beside the others on the same cores; hatched: prefill on workers of its own."
    return _picture(
        figure, "topologies", "P:D ratios, colocated and disaggregated", caption, "cells.parquet", series.cells,
        ("pd", "handoff", "drafter", "tree", "load", "tokens_per_second", "tpot_ms_p50", "ttft_ms_p50"),
    )  # fmt: skip


def _panels(count: int) -> tuple[Any, Any]:
    figure = needed("matplotlib.figure").Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _whole(axis: Any) -> None:
    axis.set_major_locator(needed("matplotlib.ticker").MaxNLocator(integer=True, min_n_ticks=1))


def _picture(
    figure: Any, name: str, title: str, caption: str, table: str, cells: Sequence[Row], columns: tuple[str, ...]
) -> Picture:
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
