"""``pdspec check lossless``: no drafter, tree or way of verification changes what is put out.

law       the output law of rejection and block, enumerated, is the target's (float64, toy target)
paths     coupled and greedy put out plain decoding's very tokens, whose law is the target's (toy target)
joint     two tokens in a row, sampled: chi-square against the exact law (toy target and model)
answers   whole answers of a real model, every family and tree
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.config import WorkerConfig
from pdspec.engine.local import LocalGenerator
from pdspec.errors import ConfigError
from pdspec.spec.registry import NAMES
from pdspec.study import lossless_paths as paths
from pdspec.study.heads import with_random_heads, worker_config
from pdspec.study.lossless_answers import answers, joints
from pdspec.study.lossless_joint import joint
from pdspec.study.lossless_law import PLAIN, PROCESSED, PROMPT, law_case
from pdspec.study.toy import toy_config, write_toys

PARTS = ("law", "paths", "joint", "answers")
Progress = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of each part is run."""

    law_tokens: int = 4
    law_large: bool = True  # larger trees, and the law without processors as well
    law_static: bool = True  # static trees have by far the most drafts to count
    harmful_seeds: int = 100_000
    family_seeds: int = 600
    family_tokens: int = 24
    fit_seeds: int = 20_000
    sample_seeds: int = 4_000
    replay_seeds: int = 12
    batch_rounds: int = 12
    tie_seeds: int = 60
    coupling_seeds: int = 100
    independence_seeds: int = 4_000
    toy_joint_seeds: int = 20_000
    joint_seeds: int = 4_000
    num_prompts: int = 20
    max_tokens: int = 128


QUICK = Sizes(
    law_large=False, harmful_seeds=1_500, family_seeds=12, family_tokens=12, fit_seeds=600, sample_seeds=300,
    replay_seeds=2, batch_rounds=1, tie_seeds=10, coupling_seeds=10, independence_seeds=150, toy_joint_seeds=250,
    joint_seeds=0, num_prompts=2, max_tokens=16,
)  # fmt: skip


def run(
    *, worker: dict[str, Any], sizes: Sizes, parts: Sequence[str] = (), drafters: Sequence[str] = NAMES,
    prompts: str | None = None, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """``worker`` is what part answers serves, whose plug-ins serve in every part. ``ok``: nothing failed. Raises
    ConfigError for an unknown part."""
    wanted = tuple(parts) or PARTS
    if unknown := [part for part in wanted if part not in PARTS]:
        raise ConfigError(f"no part {unknown[0]!r}", field="parts", remedy="use some of " + ",".join(PARTS))
    found: dict[str, Any] = {}
    if set(wanted) & {"law", "paths", "joint"}:
        with tempfile.TemporaryDirectory() as folder:
            found.update(on_toy(Path(folder), wanted, sizes, drafters, progress, worker.get("plugins", ())))
    if "answers" in wanted:
        found.update(_on_model(worker_config(worker, drafters), drafters, sizes, prompts, progress))
    return _summed(found, drafters)


def on_toy(
    folder: Path, wanted: Sequence[str], sizes: Sizes, drafters: Sequence[str], progress: Progress,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """The parts that run on the toy target, whose files are written to ``folder``."""
    write_toys(folder)
    local = LocalGenerator(toy_config(folder, tuple(dict.fromkeys(("none", *drafters))), plugins=tuple(plugins)))
    found: dict[str, Any] = {}
    try:
        if "law" in wanted:
            found["law"] = law(local, sizes, drafters, progress)
        if "paths" in wanted:
            for name, part in _paths(local, sizes, drafters).items():
                progress(f"paths.{name} …")
                found[f"paths.{name}"] = part()
                progress(f"  {found[f'paths.{name}']}")
        if "joint" in wanted:
            progress("joint, toy target …")
            found["joint.toy"] = toy_joint(local, sizes, drafters, progress)
        local.resources.pool.check_integrity([])
    finally:
        local.resources.close()
    return found


def law(local: LocalGenerator, sizes: Sizes, drafters: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Every family, tree and ratio rule."""
    cases = []
    for params in (PROCESSED, PLAIN)[: 1 + sizes.law_large]:
        for drafter, tree in paths.cases(local, drafters, sizes.law_large):
            if tree.startswith("static") and not sizes.law_static:
                continue
            for verify in ("rejection", "block") if sizes.law_large or tree.startswith("chain") else ("rejection",):
                case = law_case(local, drafter, tree, verify, params, sizes.law_tokens)
                progress(
                    f"law {drafter} {tree} {verify}: {case['max_abs_difference']:.2g}"
                    f" over {case['outcomes']} outcomes of {case['drafts']} drafts"
                )
                cases.append(case)
    return {
        "ok": all(case["ok"] for case in cases), "cases": cases,
        "max_abs_difference": max(case["max_abs_difference"] for case in cases),
    }  # fmt: skip


def toy_joint(local: LocalGenerator, sizes: Sizes, drafters: Sequence[str], progress: Progress) -> dict[str, Any]:
    """(t1, t2) of eagle3 with production's own randomness."""
    if "eagle3" not in drafters:
        return {"ok": True, "parts": []}
    found = [
        joint(local, drafter="eagle3", verify=verify, prompt=PROMPT, params=PROCESSED, seeds=sizes.toy_joint_seeds,
              progress=progress)
        for verify in ("coupled", "rejection", "block")
    ]  # fmt: skip
    return {"ok": all(part["ok"] for part in found), "parts": found}


def _paths(local: LocalGenerator, sizes: Sizes, drafters: Sequence[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "harmful_drafts": lambda: paths.harmful_drafts(local, sizes.harmful_seeds),
        "families": lambda: paths.families(local, drafters, sizes.family_seeds, sizes.family_tokens),
        "plain_law": lambda: paths.plain_law(local, sizes.fit_seeds),
        "samples": lambda: paths.samples(local, sizes.sample_seeds),
        "replay": lambda: paths.replay(local, drafters, sizes.replay_seeds),
        "batches": lambda: paths.batches(local, drafters, sizes.batch_rounds),
        "ties": lambda: paths.ties(local, sizes.tie_seeds),
        "coupling": lambda: paths.coupling(local, drafters, sizes.coupling_seeds),
        "independence": lambda: paths.independence(local, drafters, sizes.independence_seeds),
    }


def _on_model(
    config: WorkerConfig, drafters: Sequence[str], sizes: Sizes, prompts: str | None, progress: Progress
) -> dict[str, Any]:
    progress(f"answers of {config.model} …")
    config, random_heads = with_random_heads(config)
    local = LocalGenerator(config)
    try:
        found = {
            "answers": answers(
                local, drafters, num_prompts=sizes.num_prompts, max_tokens=sizes.max_tokens, prompts=prompts,
                progress=progress,
            )
            | {"random_heads": list(random_heads)}
        }
        if sizes.joint_seeds and "eagle3" in drafters:
            progress(f"joint, {config.model} …")
            found["joint.model"] = joints(local, prompts=prompts, seeds=sizes.joint_seeds, progress=progress)
        local.resources.pool.check_integrity([])
        return found
    finally:
        local.resources.close()


def _summed(found: dict[str, Any], drafters: Sequence[str]) -> dict[str, Any]:
    cases = found.get("law", {}).get("cases", [])
    return {
        "ok": all(part["ok"] for part in found.values()), "cases": len(cases) + len(found) - ("law" in found),
        "families": list(drafters), "failed": [name for name, part in found.items() if not part["ok"]],
        "max_abs_difference": found.get("law", {}).get("max_abs_difference"), "parts": found,
    }  # fmt: skip
