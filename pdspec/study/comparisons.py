"""``pdspec study {stable-kv,first-token-padding,draft-prefill,trees}``: tables of acceptance, time and bytes moved.

Each row is one drafter under one setting, the same prompts behind the handoff and in one process. Settings that belong
to a deployment (options of a family) get workers of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.errors import ConfigError
from pdspec.spec.registry import family
from pdspec.study.ways import STATIC_SHAPES, Progress, Way, behind_the_handoff, in_one_process, prompt_ids, row

NODES = (4, 8)
RANKINGS = ("online", "q")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row: ``label`` says what differs, ``changes`` are worker settings."""

    label: str
    way: Way
    changes: dict[str, Any] = field(default_factory=dict)


def stable_kv(drafters: Sequence[str], temperature: float) -> list[Cell]:
    """Draft KV of committed tokens made anew from target hidden states, or kept as the draft made it."""
    return _switched(drafters, "stable_kv", temperature)


def first_token_padding(drafters: Sequence[str], temperature: float) -> list[Cell]:
    """EAGLE's prefill with one more row in front, or without."""
    return _switched(drafters, "first_token_padding", temperature)


def draft_prefill(drafters: Sequence[str], temperature: float) -> list[Cell]:
    """Draft KV travels, or the hidden rows that it is made from."""
    return [
        Cell(label=f"draft_prefill={side}", way=Way(
            drafter=name, tree=family(name).DESCRIPTION.default_tree, temperature=temperature, draft_prefill=side,
        ))
        for name in drafters for side in ("prefill", "decode")
    ]  # fmt: skip


def trees(drafters: Sequence[str], temperature: float) -> list[Cell]:
    """Chain, static and dynamic trees of equal nodes, and dynamic ones ranked by other settings of ``survival``."""
    cells = []
    for name in drafters:
        kinds = family(name).DESCRIPTION.trees
        for nodes in NODES:
            shapes = {
                "chain": f"chain({nodes})", "static": STATIC_SHAPES[nodes],
                "dynamic": f"dynamic({nodes // 2},4,{nodes})",
            }  # fmt: skip
            for kind in kinds:
                way = Way(drafter=name, tree=shapes[kind], temperature=temperature)
                cells.append(Cell(label=f"{kind}, {nodes} nodes", way=way))
            if "dynamic" in kinds:
                way = Way(drafter=name, tree=shapes["dynamic"], temperature=temperature)
                cells += [
                    Cell(label=f"dynamic by {mode}, {nodes} nodes", way=way, changes={"survival": mode})
                    for mode in RANKINGS
                ]
    return cells


def tree_orders(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of ``trees``, for each family, temperature and number of nodes: acceptance length by setting, and
    whether dynamic >= static >= chain and survival (as deployed, and fitted online) >= q."""
    lengths: dict[tuple[str, float, str], dict[str, float]] = {}
    for one in rows:
        kind, nodes = one["setting"].split(", ")
        lengths.setdefault((one["drafter"], one["temperature"], nodes), {})[kind] = one["acceptance_length"]
    orders = []
    for (drafter, temperature, nodes), found in lengths.items():
        shapes = [found[kind] for kind in ("dynamic", "static", "chain") if kind in found]
        ranked = [found[kind] for kind in ("dynamic", "dynamic by online") if kind in found]
        orders.append({
            "drafter": drafter, "temperature": temperature, "nodes": nodes, "acceptance_length": found,
            "dynamic_static_chain": shapes == sorted(shapes, reverse=True),
            "survival_over_q": all(length >= found["dynamic by q"] for length in ranked),
        })  # fmt: skip
    return orders


STUDIES: dict[str, Callable[[Sequence[str], float], list[Cell]]] = {
    "stable-kv": stable_kv, "first-token-padding": first_token_padding, "draft-prefill": draft_prefill, "trees": trees,
}  # fmt: skip


def run(
    study: str, *, worker: dict[str, Any], drafters: Sequence[str], temperatures: Sequence[float],
    prompts: str | None, num_prompts: int, max_tokens: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The table of one study. Raises ConfigError for families that it says nothing about."""
    cells = [cell for temperature in temperatures for cell in STUDIES[study](drafters, temperature)]
    if not cells:
        raise ConfigError(f"study {study} says nothing about {', '.join(drafters)}", field="drafters",
                          remedy="name a family that has what it compares; see pdspec drafters")
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(cell.changes, sort_keys=True), []).append(cell)
    table: dict[int, dict[str, Any]] = {}
    for group in groups.values():
        names = tuple(dict.fromkeys(("none", *(cell.way.drafter for cell in group))))
        values = {"drafter": "none", "prefix_cache": "off", **worker, "drafters": names}
        options = {**values.get("options", {}), **group[0].changes.get("options", {})}
        config = WorkerConfig.from_mapping({**values, **group[0].changes, "options": options})
        ids = prompt_ids(config, prompts, num_prompts)
        ways = [cell.way for cell in group]
        progress(f"{study}: {json.dumps(group[0].changes)}")
        alone = in_one_process(config, ways, ids, max_tokens, progress)
        behind = behind_the_handoff(config, ways, ids, max_tokens, progress)
        for cell in group:
            way = cell.way
            table[id(cell)] = {"setting": cell.label, **row(way, behind[way], alone[way])}
    rows = [table[id(cell)] for cell in cells]
    result = {"ok": all(one["same_answers"] for one in rows), "study": study, "rows": rows}
    return {**result, "orders": tree_orders(rows)} if study == "trees" else result


def _switched(drafters: Sequence[str], option: str, temperature: float) -> list[Cell]:
    """Families that have this option, with it on and off."""
    return [
        Cell(
            label=f"{option}={value}", changes={"options": {f"{name}:{option}": value}},
            way=Way(drafter=name, tree=family(name).DESCRIPTION.default_tree, temperature=temperature),
        )
        for name in drafters if option in family(name).DESCRIPTION.options for value in ("true", "false")
    ]  # fmt: skip
