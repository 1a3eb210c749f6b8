"""The same in the terminal, while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text


def first(text: str) -> Text:
    """The token that came from prefill."""
    return Text(text, style="bold")


def tokens(step: Mapping[str, Any]) -> Text:
    """What a verification adds to the answer: accepted tokens green, the token that the target put instead bold."""
    accepted = len(step["path"])
    found = Text()
    for place, text in enumerate(step["out"]):
        found.append(text, style="green" if place < accepted else "bold yellow")
    return found


def line(number: int, step: Mapping[str, Any]) -> Text:
    """One verification: drafts with check and cross, p and q, what came instead, and the KV that was rewound."""
    nodes, path = step["nodes"], set(step["path"])
    found = Text(f"{number:4d}  ", style="dim")
    main = list(step["path"]) + _missed(step)
    for node in main:
        one, good = nodes[node], node in path
        found.append(f"{_shown(one['t'])} ", style="green" if good else "red strike")
        q = "" if one["q"] is None else f" q {one['q']:.2f}"
        found.append(f"{'✓' if good else '✗'} p {one['p']:.2f}{q}  ", style="green" if good else "red")
    if len(nodes) > len(main):
        found.append(f"+{len(nodes) - len(main)} more  ", style="dim")
    found.append(f"→ {_shown(step['out'][-1])}", style="bold yellow")
    rewound = step["kv_peak"] - step["kv_after"]
    found.append(f"   KV {step['kv_before']} ↗ {step['kv_peak']} ↘ {step['kv_after']}", style="dim")
    found.append(f" ({rewound} rows back)" if rewound else "", style="dim")
    return found


def _missed(step: Mapping[str, Any]) -> list[int]:
    """The best drafted child at the place where the walk ended, if there was one."""
    end = step["path"][-1] if step["path"] else -1
    return [node for node, one in enumerate(step["nodes"]) if one["parent"] == end][:1]


def _shown(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "·") or "∅"
