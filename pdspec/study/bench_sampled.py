"""Sampled decoding beside greedy, for ``pdspec bench decode --temperature``.

Sampled answers are other texts, of which a drafter foresees another share; what sampling itself costs is seen at equal
acceptance: the time of a verification, which has the same rows either way.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pdspec.study.settings import Setting


def twins(best: Mapping[str, Setting], temperature: float, top_p: float) -> dict[str, Setting]:
    """Each setting sampled; none at temperature 0."""
    if not temperature:
        return {}
    return {name: replace(setting, temperature=temperature, top_p=top_p) for name, setting in best.items()}


def against_greedy(
    measured: Mapping[Setting, Sequence[Mapping[str, Any]]], best: Mapping[str, Setting], sampled: Mapping[str, Setting]
) -> dict[str, Any]:
    """By drafter: rates of the sampled answers, and ``ratio_at_equal_acceptance``, sampled to greedy tokens per second
    if both accepted alike (median of runs in turns). Every drafter must sample the same tokens."""
    table = {}
    for name, setting in sampled.items():
        rows, greedy = measured[setting], measured[best[name]]
        table[name] = {
            "tree": setting.tree,
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
            "acceptance_length": rows[0]["acceptance_length"],
            "ms_per_verification": statistics.median(row["ms_per_verification"] for row in rows),
            "ratio_at_equal_acceptance": statistics.median(
                a["ms_per_verification"] / b["ms_per_verification"] for a, b in zip(greedy, rows, strict=True)
            ),
        }
    answers = [measured[setting][0]["answers"] for setting in sampled.values()]
    first = next(iter(sampled.values()))
    return {
        "temperature": first.temperature, "top_p": first.top_p, "drafters": table,
        "same_tokens": all(one == answers[0] for one in answers),
    }  # fmt: skip
