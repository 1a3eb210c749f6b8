"""``pdspec check lossless``, reduced: every family of the registry, every part."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from pdspec.cli.app import build_app
from pdspec.spec.registry import NAMES
from pdspec.study import lossless

SIZES = lossless.Sizes(
    law_large=False, law_static=False, harmful_seeds=150, family_seeds=3, family_tokens=8, fit_seeds=200,
    sample_seeds=100, replay_seeds=1, batch_rounds=1, tie_seeds=8, coupling_seeds=3, independence_seeds=40,
    toy_joint_seeds=60, joint_seeds=0, num_prompts=1, max_tokens=8,
)  # fmt: skip


def test_every_part_passes_for_every_family():
    result = lossless.run(worker={"model": "tiny"}, sizes=SIZES, progress=lambda _: None)
    assert result["ok"] and not result["failed"], result["failed"]
    assert result["families"] == list(NAMES) and result["max_abs_difference"] <= 1e-9
    judged = {(case["drafter"], case["verify"]) for case in result["parts"]["law"]["cases"]}
    assert {name for name, _ in judged} == set(NAMES) and {"rejection", "block"} == {verify for _, verify in judged}
    assert result["parts"]["answers"]["answers"] > 2 * (len(NAMES) - 1)


def test_the_command_fails_when_a_part_does(monkeypatch):
    failed = {"ok": False, "cases": 1, "families": [], "max_abs_difference": None}
    monkeypatch.setattr(lossless, "run", lambda **_: failed)
    ran = CliRunner().invoke(build_app(), ["check", "lossless", "--quick", "--json"])
    assert ran.exit_code == 1 and not json.loads(ran.stdout)["ok"]
