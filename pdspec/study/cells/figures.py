"""The pictures of a report that every study has, each with the cells and columns that it was made from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pdspec.study.cells.drawing import Picture, Row, Series, panels, picture, whole_numbers
from pdspec.study.cells.measures import BIN, acceptance, per_position, tpot
from pdspec.study.cells.phase_figures import split, turns
from pdspec.study.plan.closed import expected_tokens

_CHAIN = re.compile(r"chain\((\d+)\)")


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
    return found + [one for one in (split(series), turns(series, answered)) if one is not None]


def _pareto(series: Series) -> Picture:
    figure, (axes,) = panels(1)
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
    return picture(
        figure, "pareto", "Latency and throughput", caption, "cells.parquet", series.cells,
        ("pd", "handoff", "drafter", "tree", "load", "tokens_per_second", "tpot_ms_p50"),
    )  # fmt: skip


def _cdfs(series: Series, requests: Sequence[Row]) -> Picture:
    load = max(series.cells, key=lambda row: row["span_s"] and row["output_tokens"] / row["span_s"])["load"]
    chosen = [row for row in series.cells if row["load"] == load]
    figure, axes = panels(2)
    for row in chosen:
        own = [one for one in requests if one["cell"] == row["cell"]]
        for panel, values in zip(axes, ([one["ttft_ms"] for one in own], [tpot(one) for one in own]), strict=True):
            panel.ecdf(values, label=series.label(row), **series.look(row))
    axes[0].set(xlabel="time to first token (ms)", ylabel="share of requests")
    axes[1].set(xlabel="time per output token (ms)")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = f"Requests of the cells under “{load}”, the load with the highest throughput."
    return picture(
        figure, "cdf", "Distribution of latencies", caption, "requests.parquet", chosen,
        ("cell", "ttft_ms", "total_ms", "output_tokens"),
    )  # fmt: skip


def _timeline(series: Series, requests: Sequence[Row]) -> Picture:
    chosen = max(series.cells, key=lambda row: (row["prefill"] > 0, row["tokens_per_second"]))
    figure, (axes,) = panels(1)
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
    whole_numbers(axes.yaxis)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=3)
    caption = f"One run, {series.label(chosen)}, {chosen['load']}: the disaggregated cell with the highest throughput."
    if not chosen["prefill"]:
        caption = f"One run, {series.label(chosen)}, {chosen['load']}: the cell with the highest throughput."
    return picture(
        figure, "timeline", "Timeline of one run", caption, "requests.parquet", [chosen],
        ("cell", "asked_s", "ttft_ms", "total_ms", "piece_ms"),
    )  # fmt: skip


def _along(series: Series, requests: Sequence[Row]) -> Picture:
    drafting = [row for row in series.cells if row["acceptance_per_position"]]
    figure, axes = panels(2)
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
    return picture(
        figure, "acceptance", "Acceptance along the answers", caption, "requests.parquet", drafting,
        ("cell", "token_ids", "piece_tokens", "output_tokens", "verifications"),
    )  # fmt: skip


def _positions(series: Series, requests: Sequence[Row]) -> Picture:
    drafting = [row for row in series.cells if row["acceptance_per_position"]]
    figure, axes = panels(2)
    whole_numbers(axes[0].xaxis)
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
    return picture(
        figure, "positions", "Acceptance per position, measured and predicted", caption, "requests.parquet", drafting,
        ("cell", "accepted_per_position", "reached_per_position", "output_tokens", "verifications"),
    )  # fmt: skip


def _topologies(series: Series) -> Picture:
    figure, axes = panels(3)
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
    return picture(
        figure, "topologies", "P:D ratios, colocated and disaggregated", caption, "cells.parquet", series.cells,
        ("pd", "handoff", "drafter", "tree", "load", "tokens_per_second", "tpot_ms_p50", "ttft_ms_p50"),
    )  # fmt: skip
