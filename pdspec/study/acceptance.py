"""``pdspec study acceptance``: what every draft family is worth, behind the handoff and in one process.

The same requests run through router, prefill and decode worker and in this process: the acceptance of both stands side
by side, and must be the same.

At temperature 1 the ways of verifying one family are compared as well (``judged``): tokens chosen by the target's own
noise (coupled), drawn from q and judged by the ratio rule (rejection), judged as a block, and the best of q taken
without drawing (rejection over dynamic trees). ``overlap`` is the mean of sum(min(p, q)) over the roots of drafts of
one drawn token: what the ratio rule accepts of them on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pdspec.engine.decode import DecodeEngine
from pdspec.engine.resources import Resources
from pdspec.engine.sequence import DecodeSequence
from pdspec.sampling import support
from pdspec.spec.protocol import Draft
from pdspec.spec.ratio import Masses, masses_of
from pdspec.spec.registry import family
from pdspec.spec.verify import VerdictResult
from pdspec.study.heads import at_hand, worker_config
from pdspec.study.ways import STATIC_SHAPES, Progress, Way, behind_the_handoff, in_one_process, prompt_ids, row

ONE = "chain(1)"


def run(
    *, worker: dict[str, Any], drafters: Sequence[str], trees: dict[str, str], temperatures: Sequence[float],
    judged: str, nodes: int, prompts: str | None, num_prompts: int, max_tokens: int, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``drafters`` (none named: all that have a head or need none) at their trees (``trees``, else each family's
    default); ``judged`` names the family whose ways of verifying are compared at ``nodes`` draft nodes (empty: none).
    Raises ConfigError and UnknownName."""
    drafters = drafters or at_hand(worker)
    names = tuple(dict.fromkeys(("none", *drafters, *([judged] if judged else []))))
    config = worker_config(worker, names)
    ids = prompt_ids(config, prompts, num_prompts)
    ways = [
        Way(drafter=name, tree=trees.get(name) or family(name).DESCRIPTION.default_tree, temperature=temperature)
        for temperature in temperatures for name in names
    ]  # fmt: skip
    compared = judged_ways(judged, nodes) if judged else []
    every = list(dict.fromkeys([*ways, *compared]))
    sums: list[float] = []
    alone = in_one_process(config, every, ids, max_tokens, progress, lambda resources: Overlapping(resources, sums))
    behind = behind_the_handoff(config, every, ids, max_tokens, progress)
    rows = {way: row(way, behind[way], alone[way]) for way in every}
    result: dict[str, Any] = {
        "ok": all(one["same_answers"] for one in rows.values()),
        "prompts": len(ids), "max_tokens": max_tokens, "families": [rows[way] for way in ways],
    }  # fmt: skip
    if compared:
        table = [rows[way] for way in compared]
        result["judged"] = {
            "drafter": judged, "nodes": nodes, "ways": table, "overlap": float(np.mean(sums)), **ordered(table, nodes),
        }  # fmt: skip
    return result


def judged_ways(drafter: str, nodes: int) -> list[Way]:
    """One family at temperature 1: one node, then ``nodes`` nodes as chain, static and dynamic tree."""
    static = STATIC_SHAPES.get(nodes, f"static({nodes})")
    dynamic = f"dynamic({max(2, nodes // 2)},4,{nodes})"
    found = [(ONE, verify) for verify in ("coupled", "rejection")] + [("dynamic(1,1,1)", "rejection")]
    found += [(f"chain({nodes})", verify) for verify in ("coupled", "rejection", "block")]
    found += [(tree, verify) for tree in (static, dynamic) for verify in ("coupled", "rejection")]
    return [Way(drafter=drafter, tree=tree, temperature=1.0, verify=verify) for tree, verify in found]


def ordered(rows: Sequence[dict[str, Any]], nodes: int) -> dict[str, Any]:
    """Acceptance lengths of ``nodes`` coupled draft nodes by kind of tree, and whether dynamic >= static >= chain."""
    coupled = [one for one in rows if one["verify"] == "coupled" and one["tree"] != ONE]
    by_kind = {one["tree"].split("(")[0]: one["acceptance_length"] for one in coupled}
    in_order = by_kind["dynamic"] >= by_kind["static"] >= by_kind["chain"]
    return {"by_kind_of_tree": by_kind, "dynamic_static_chain": in_order}


class Overlapping(DecodeEngine):
    """A decode engine that also notes sum(min(p, q)) at the roots of drafts of one drawn token."""

    def __init__(self, resources: Resources, sums: list[float]) -> None:
        super().__init__(resources)
        self.sums = sums

    def judge(self, sequence: DecodeSequence, draft: Draft, logits: torch.Tensor) -> VerdictResult:
        if sequence.ctx.tree == ONE and (law := draft.laws.get(-1)):
            allowed = support(logits[0], sequence.request.sampling, sequence.history, end_ids=self.resources.end_ids)
            p, q = Masses.of(allowed), masses_of(law)
            self.sums.append(float(sum(np.minimum([p.at(token) for token in law.token_ids.tolist()], q))))
        return super().judge(sequence, draft, logits)
