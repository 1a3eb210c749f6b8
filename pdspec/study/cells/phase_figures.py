"""The pictures of a report that only some studies have: where decode steps' time went, first tokens by turn."""

from __future__ import annotations

from collections.abc import Sequence

from pdspec.study.cells.drawing import Picture, Row, Series, panels, picture, whole_numbers
from pdspec.study.cells.measures import at

_PARTS = (("draft_share", "drafting"), ("verify_share", "the target's forward"), ("other_share", "judging, committing"))


def split(series: Series) -> Picture | None:
    """Of the cells whose workers' clocks are known; None without one."""
    chosen = [row for row in series.cells if row.get("busy_share")]
    if not chosen:
        return None
    figure, (axes,) = panels(1)
    for place, row in enumerate(chosen):
        left = 0.0
        for number, (key, label) in enumerate(_PARTS):
            wide = row[key] * row["busy_share"]
            axes.barh(place, wide, left=left, color=series.colour(row), alpha=(1.0, 0.55, 0.25)[number],
                      label="" if place else label)  # fmt: skip
            left += wide
        axes.barh(place, max(0.0, 1.0 - left), left=left, color="0.93", label="" if place else "in no decode step")
    axes.set_yticks(range(len(chosen)), [f"{series.label(row)}, {row['load']}" for row in chosen], fontsize=7)
    axes.set(xlabel="share of the cell's time, mean of the decode workers", xlim=(0, 1.02))
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=4)
    caption = (
        "What decode workers did, by their own clocks. In no decode step they wait, or compute prompts where there is "
        "no prefill worker."
    )
    return picture(
        figure, "split", "Drafting, verifying, and the rest", caption, "cells.parquet", chosen,
        ("pd", "handoff", "drafter", "tree", "load", *(key for key, _ in _PARTS), "busy_share"),
    )  # fmt: skip


def turns(series: Series, requests: Sequence[Row]) -> Picture | None:
    """Of the cells with conversations; None without one."""
    chosen = [row for row in series.cells if (row.get("turns") or 1) > 1]
    if not chosen:
        return None
    figure, (axes,) = panels(1)
    for row in chosen:
        own = [one for one in requests if one["cell"] == row["cell"]]
        known = sorted({one["turn"] for one in own})
        times = [at(sorted(one["ttft_ms"] for one in own if one["turn"] == turn), 0.5) for turn in known]
        label = f"{series.label(row)}, {row['load']}"
        axes.plot(known, times, marker=series.marker(row), label=label, **series.look(row))
    whole_numbers(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="turn of the conversation", ylabel="time to first token, P50 (ms)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = "A later turn brings the whole conversation before it; prefix caches spare what is known of it."
    return picture(
        figure, "turns", "First tokens along a conversation", caption, "requests.parquet", chosen,
        ("cell", "turn", "ttft_ms"),
    )  # fmt: skip
