"""``pdspec plan``: the closed form beside the roofline, and what they advise."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from pdspec.settings import unknown_name
from pdspec.study.plan import advice
from pdspec.study.plan.advice import Load, Setting
from pdspec.study.plan.closed import best_drafts, speculation
from pdspec.study.plan.drafts import TYPICAL_ALPHA, DraftCost, draft_cost
from pdspec.study.plan.hardware import hardware
from pdspec.study.plan.roofline import Roofline
from pdspec.study.plan.shapes import Shape, model_shape

FAMILIES = ("ngram", "medusa", "eagle1", "eagle3", "mtp")  # compared where one is to be recommended


@dataclass(frozen=True, kw_only=True)
class Question:
    """``drafter`` is a family or a decoder; empty: the best of those that need no other model. ``alpha`` 0: the
    family's typical one. ``drafts`` 0: the best K."""

    hardware: str = "a100-80gb"
    model: str = "llama-3.1-8b"
    drafter: str = ""
    alpha: float = 0.0
    drafts: int = 0
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    devices: int = 1
    load: Load = Load()


CASES = {
    "a100-llama2-13b": Question(
        hardware="a100-40gb", model="llama-2-13b", drafter="llama-68m", alpha=0.8, drafts=4, dtype="float16",
        load=Load(batch=1, prompt=128, output=256),
    ),
}  # fmt: skip


def case(name: str) -> Question:
    """Raises ConfigError for a case that is not there."""
    if name not in CASES:
        raise unknown_name("case", name, tuple(CASES), field="--case", where="the cases")
    return CASES[name]


def answer(question: Question) -> dict[str, Any]:
    """Everything, as one mapping. ``expected_tokens``, ``ms_per_token``, ``baseline_ms_per_token`` and ``speedup`` are
    the closed form's, from T_draft and T_target of the roofline, whose own rows also count the rows verified."""
    target = target_of(question)
    cost, alpha = _drafter(question, target)
    load = question.load
    base = advice.plain(target, load)
    if question.drafts:
        form = speculation(alpha, question.drafts, cost.draft_s(1), base.step_s)
        chain = advice.best_chain(target, cost, alpha, load, drafts=question.drafts)
    else:
        form = best_drafts(alpha, cost.draft_s(1), base.step_s)
        chain = advice.best_chain(target, cost, alpha, load)
    tree = advice.best_tree(target, cost, alpha, load)
    best = min((base, chain, tree), key=lambda one: one.token_s)
    return {
        "hardware_name": question.hardware, "model": question.model, "drafter": cost.name, "alpha": alpha,
        "k": form.drafts, "load": asdict(load), "devices": question.devices,
        "expected_tokens": form.expected_tokens, "ms_per_token": 1e3 * form.token_s,
        "baseline_ms_per_token": 1e3 * base.token_s, "speedup": form.speedup,
        "draft_ms": 1e3 * cost.draft_s(1), "target_ms": 1e3 * base.step_s,
        "roofline": {"none": _shown(base, base), "chain": _shown(chain, base), "tree": _shown(tree, base)},
        "memory": _memory(target, cost),
        "batches": advice.batches(target, cost, alpha, load),
        "contexts": _contexts(target, cost, alpha, load),
        "transfer": advice.transfer(target, cost, load.prompt),
        "colocated": advice.colocated(target, best, load),
        "recommended": {
            "drafter": best.drafter, "tree": best.tree, "pd": advice.ratio(target, best, load)["pd"],
            "pd_without_drafts": advice.ratio(target, base, load)["pd"],
            "draft_prefill": advice.transfer(target, cost, load.prompt)["draft_prefill"],
        },
        "ratio": advice.ratio(target, best, load),
    }  # fmt: skip


def target_of(question: Question) -> Roofline:
    """The target on its devices. Raises ConfigError for names that are not known."""
    shape = Shape(config=model_shape(question.model), dtype=question.dtype, kv_dtype=question.kv_dtype)
    return Roofline(hardware=hardware(question.hardware), shape=shape, devices=question.devices)


def _drafter(question: Question, target: Roofline) -> tuple[DraftCost, float]:
    """The one asked for, or the best under this load, with its alpha."""

    def priced(name: str) -> tuple[DraftCost, float]:
        cost = draft_cost(name, target, batch=question.load.batch, context=question.load.context)
        return cost, question.alpha or TYPICAL_ALPHA.get(name, TYPICAL_ALPHA["draft_model"])

    if question.drafter:
        return priced(question.drafter)
    options = [priced(name) for name in FAMILIES]
    return min(options, key=lambda one: advice.best_chain(target, one[0], one[1], question.load).token_s)


def _shown(setting: Setting, base: Setting) -> dict[str, Any]:
    return {
        "tree": setting.tree, "nodes": setting.nodes, "expected_tokens": setting.expected_tokens,
        "step_ms": 1e3 * setting.step_s, "draft_ms": 1e3 * setting.draft_s, "ms_per_token": 1e3 * setting.token_s,
        "speedup": base.token_s / setting.token_s,
    }  # fmt: skip


def _memory(target: Roofline, cost: DraftCost) -> dict[str, float]:
    """What the target takes and the drafter adds, and the KV tokens that are left."""
    weights, kv = target.shape.weight_bytes, target.shape.kv_bytes
    return {
        "target_bytes": weights, "draft_bytes": cost.weight_bytes, "draft_share": cost.weight_bytes / weights,
        "kv_bytes_per_token": kv, "draft_kv_bytes_per_token": cost.kv_bytes, "draft_kv_share": cost.kv_bytes / kv,
        "device_bytes": target.hardware.memory * target.devices,
        "kv_tokens": float(target.tokens_held()), "kv_tokens_with_draft": float(_held(target, cost)),
    }  # fmt: skip


def _held(target: Roofline, cost: DraftCost) -> int:
    """KV tokens where each also has its draft rows."""
    tokens = target.tokens_held(beside=cost.weight_bytes)
    return int(tokens * target.shape.kv_bytes / (target.shape.kv_bytes + cost.kv_bytes))


def _contexts(target: Roofline, cost: DraftCost, alpha: float, load: Load) -> list[dict[str, Any]]:
    """The best chain at longer and longer prompts: KV makes a step dearer, drafts of few layers hardly."""
    rows: list[dict[str, Any]] = []
    for prompt in (512, 4096, 32768):
        own = replace(load, prompt=prompt)
        base, best = advice.plain(target, own), advice.best_chain(target, cost, alpha, own)
        rows.append({
            "prompt": prompt, "tree": best.tree, "baseline_ms_per_token": 1e3 * base.token_s,
            "ms_per_token": 1e3 * best.token_s, "speedup": base.token_s / best.token_s,
        })  # fmt: skip
    return rows
