"""From a roofline to what to deploy: drafter, K or tree, P:D, who prefills the drafter, and what colocation costs.

All of it are functions of values. Trees and their sizes are chosen by the engine's own budget policy
(``pdspec.engine.budget``), so the plan and the running worker take the same argmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pdspec.engine.budget import best_budget
from pdspec.study.plan.closed import CHAIN, expected_tokens
from pdspec.study.plan.drafts import DraftCost
from pdspec.study.plan.roofline import Roofline

_WIDEST, _DEEPEST = 8, 8  # children and levels of the trees that are looked at
_MOST_NODES = 64


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one decode worker has to do: sequences at once, tokens of a prompt and of an answer."""

    batch: int = 1
    prompt: int = 512
    output: int = 512

    @property
    def context(self) -> float:
        """Tokens before a row, on average over an answer."""
        return self.prompt + self.output / 2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A drafter with a tree under a load. Seconds."""

    drafter: str
    tree: str  # as requests name it; empty: plain decoding
    nodes: int
    expected_tokens: float
    draft_s: float
    step_s: float

    @property
    def token_s(self) -> float:
        """Of one output token of one sequence."""
        return self.step_s / self.expected_tokens


def plain(target: Roofline, load: Load) -> Setting:
    """No drafts."""
    return Setting(
        drafter="none", tree="", nodes=0, expected_tokens=1.0, draft_s=0.0,
        step_s=target.step_s(load.batch, 0, load.context),
    )  # fmt: skip


def best_chain(target: Roofline, cost: DraftCost, alpha: float, load: Load, *, drafts: int = 0) -> Setting:
    """The K of the fewest seconds per token (``drafts`` > 0: that one)."""
    found = [plain(target, load)] if not drafts else []
    for k in (drafts,) if drafts else range(1, CHAIN + 1):
        draft_s = cost.draft_s(k)
        step_s = draft_s + target.step_s(load.batch, k, load.context)
        found.append(Setting(
            drafter=cost.name, tree=f"chain({k})", nodes=k, expected_tokens=expected_tokens(alpha, k),
            draft_s=draft_s, step_s=step_s,
        ))  # fmt: skip
    return min(found, key=lambda one: one.token_s)


def rank_survival(alpha: float, depth: int, width: int = _WIDEST) -> np.ndarray:
    """Survival of the nodes of a tree ``depth`` deep, in falling order. The guess of rank r at a token is right with
    chance alpha · ((1 − alpha) / 2)^r: half as good at what the guesses before it left (an assumption; measured
    profiles replace it where there are some)."""
    ranks = alpha * ((1.0 - alpha) / 2) ** np.arange(width)
    level, found = np.ones(1), []
    for _ in range(depth):
        level = np.sort((level[:, None] * ranks).ravel())[::-1][:_MOST_NODES]
        found.append(level)
    return np.sort(np.concatenate(found))[::-1][:_MOST_NODES].astype(np.float32)


def best_tree(target: Roofline, cost: DraftCost, alpha: float, load: Load) -> Setting:
    """Depth and nodes of the most tokens per second: the engine's own choice of a budget, over each depth."""
    best = plain(target, load)
    times, kv_tokens = target.verify_times(load.context), round(load.batch * load.context)
    for depth in range(1, _DEEPEST + 1):
        survival = rank_survival(alpha, depth)
        pool = np.repeat(survival, load.batch)  # every sequence has the same prospects
        draft_s = cost.draft_s(depth)
        choice = best_budget(load.batch, load.batch, pool, draft_s, lambda rows: times.at(rows, kv_tokens))
        nodes = choice.nodes // load.batch
        if nodes < 1:
            continue
        setting = Setting(
            drafter=cost.name, tree=f"dynamic({depth},{_WIDEST},{nodes})", nodes=nodes,
            expected_tokens=1.0 + float(survival[:nodes].sum()), draft_s=draft_s,
            step_s=draft_s + target.step_s(load.batch, nodes, load.context),
        )  # fmt: skip
        best = min(best, setting, key=lambda one: one.token_s)
    return best


def transfer(target: Roofline, cost: DraftCost, prompt: int) -> dict[str, Any]:
    """Bytes of a handoff and its time on the link; what is exposed of it where layers travel while the next is
    computed; and who should prefill the drafter: whoever makes the fewer bytes travel, the prefill worker on a tie."""
    layers, link = target.shape.config.num_layers, target.hardware.link
    kv, draft, hidden = prompt * target.shape.kv_bytes, prompt * cost.kv_bytes, prompt * cost.hidden_bytes
    seconds, prefill = (kv + draft) / link, target.prefill_s(prompt)
    exposed = max((kv / layers + draft) / link, seconds - prefill * (layers - 1) / layers)
    own = prompt * cost.prefill_flops / target.hardware.compute
    by_decode = bool(cost.hidden_bytes) and hidden < draft
    return {
        "kv_bytes": kv, "draft_kv_bytes": draft, "hidden_bytes_instead": hidden, "seconds": seconds,
        "exposed_seconds": exposed, "share_of_ttft": exposed / (prefill + exposed),
        "draft_prefill": "decode" if by_decode else "prefill", "draft_prefill_seconds": own,
    }  # fmt: skip


def ratio(target: Roofline, setting: Setting, load: Load) -> dict[str, Any]:
    """P:D at which both are as busy: prefill seconds of a request to its share of decode seconds. Speculation makes
    decode shorter, so it asks for more prefill workers."""
    prefill_s = target.prefill_s(load.prompt)
    decode_s = load.output * setting.token_s / load.batch
    share = prefill_s / decode_s
    p, d = _fraction(share)
    return {"prefill_seconds": prefill_s, "decode_seconds": decode_s, "prefill_per_decode": share, "pd": f"{p}:{d}"}


def colocated(target: Roofline, setting: Setting, load: Load, chunk: int = 2048) -> dict[str, float]:
    """What prefills on the decode worker cost its tokens: the stall of one chunk, and the mean where each sequence that
    ends is followed by the next prompt."""
    prefill_s = target.prefill_s(load.prompt)
    stall = target.prefill_s(min(chunk, load.prompt))
    mean = setting.token_s + load.batch * prefill_s / load.output
    return {
        "token_seconds": mean, "slowdown": mean / setting.token_s, "worst_gap_seconds": setting.step_s + stall,
        "worst_gap_ratio": (setting.step_s + stall) / setting.step_s,
    }  # fmt: skip


def batches(
    target: Roofline, cost: DraftCost, alpha: float, load: Load, sizes: Sequence[int] = (1, 4, 16, 64, 256)
) -> list[dict[str, Any]]:
    """The best setting at each batch: where speculation stops to pay, K falls to 0."""
    rows: list[dict[str, Any]] = []
    for batch in sizes:
        own = Load(batch=batch, prompt=load.prompt, output=load.output)
        base, best = plain(target, own), best_chain(target, cost, alpha, own)
        rows.append({
            "batch": batch, "tree": best.tree, "tokens_per_second": batch / best.token_s,
            "speedup": base.token_s / best.token_s,
            "fits": batch * (own.prompt + own.output) <= target.tokens_held(beside=cost.weight_bytes),
        })  # fmt: skip
    return rows


def _fraction(share: float, most: int = 16) -> tuple[int, int]:
    """Small whole numbers whose ratio is nearest to ``share``."""
    options = [(p, d) for p in range(1, most + 1) for d in range(1, most + 1)]
    return min(options, key=lambda pair: abs(np.log(pair[0] / pair[1] / share)) + 0.02 * sum(pair))
