"""A card shows what was recorded: training, its curve, acceptance token by token and as served."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdspec.cli.app import build_app
from pdspec.errors import ConfigError
from pdspec.model.loader import resolve
from pdspec.spec.eagle3.checkpoint import load_head, random_head, save_head
from pdspec.spec.eagle3.config import Eagle3Config
from pdspec.spec.heads import TargetIdentity
from pdspec.train.card import add_to_card, served_rows, write_card, write_curve
from pdspec.train.curve import loss_svg

MODEL = "tiny-5"


@pytest.fixture
def head(tmp_path: Path) -> Path:
    files = resolve(MODEL)
    identity = TargetIdentity.of(files.config, content_hash=files.content_hash, tokenizer_hash=files.tokenizer_hash)
    made = random_head(Eagle3Config.for_target(files.config, 96), 5, identity)
    made.card.update(title="EAGLE-3", model=MODEL, command="pdspec train eagle3 ...", parameters=2_000_000,
                     data={"a": {"samples": 3, "answer_tokens": 75}, "b": {"samples": 1, "answer_tokens": 25}},
                     loss_curve=[(5, 4.5), (10, 3.25)])  # fmt: skip
    save_head(tmp_path / "head", made, int8=True)
    return tmp_path / "head"


def study() -> dict[str, object]:
    row = {"drafter": "eagle3", "tree": "chain(2)", "temperature": 1.0, "acceptance_length": 1.875,
           "acceptance_per_position": [0.5, 0.25], "repeated_8gram_share": 0.125, "draft_ms": 1.0}  # fmt: skip
    return {"prompts": 16, "max_tokens": 64, "families": [{**row, "drafter": "none"}, row]}


def test_the_picture_rises_and_falls_with_the_loss() -> None:
    drawn = ElementTree.fromstring(loss_svg([(1, 8.0), (50, 2.0), (100, 5.0)]))
    line = next(node for node in drawn.iter() if node.tag.endswith("polyline")).attrib["points"]
    (x0, y0), (x1, y1), (x2, y2) = [map(float, pair.split(",")) for pair in line.split()]
    assert x0 < x1 < x2 and y0 < y2 < y1  # a lower loss stands lower, at a larger y
    loss_svg([(1, 3.0)])


def test_a_card_without_figures_has_none_and_takes_those_that_come(head: Path) -> None:
    bare = write_card(head).read_text()
    assert "## Acceptance" not in bare and "| loss | 4.50 | 3.25 |" in bare
    write_curve(head, [(1, 5.0), (2, 4.0)])
    figures = {"samples": 2, "rows": 40, "top1": [0.5], "top4": [0.75], "chain_length": 1.5, "repeated": 0.0625}
    add_to_card(head, evaluations={"bench, T = 1": {**figures, "command": "pdspec train card x"}})
    add_to_card(head, served=served_rows(study(), "eagle3"), served_commands=["pdspec study acceptance ..."])
    text = write_card(head).read_text()
    assert "![loss by step](loss.svg)" in text and "| a | 3 | 75 | 75.0% |" in text
    assert "| bench, T = 1 | 2 | 40 | 6.2% | best | 0.500 | 1.50 |" in text
    assert "| chain(2) | 1 | 16 x 64 | 1.88 | 12.5% | 0.500 | 0.250 |" in text
    for command in ("pdspec train eagle3 ...", "pdspec train card x", "pdspec study acceptance ..."):
        assert command in text
    with pytest.raises(ConfigError, match="no row of medusa"):
        served_rows(study(), "medusa")


def test_the_command_measures_and_takes_in_served_figures(head: Path, tmp_path: Path) -> None:
    before = load_head(head)
    asked, served = tmp_path / "asked.jsonl", tmp_path / "served.json"
    asked.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(2)))
    served.write_text(json.dumps(study()))
    result = CliRunner().invoke(build_app(), [
        "train", "card", str(head), "--model", MODEL, "--prompts", str(asked), "--max-tokens", "12",
        "--served", str(served), "--threads", "1",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    text = (head / "README.md").read_text()
    assert "| asked, T = 0 | 2 |" in text and "| asked, T = 1 | 2 |" in text and "| chain(2) | 1 |" in text
    after = load_head(head)
    assert after.fingerprint() == before.fingerprint() and after.target == before.target
    assert set(after.card["evaluations"]) == {"asked, T = 0", "asked, T = 1"}
