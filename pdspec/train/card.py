"""A head's card: ``README.md`` beside its weights, written from what training and evaluation recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.train.evaluate import Acceptance


@dataclass(frozen=True, kw_only=True)
class CardText:
    """What a card says. ``about``: one sentence on what the head is made of; ``evaluations`` by name of the prompts;
    ``commands`` reproduce head and figures; ``notes`` say what the figures do not."""

    title: str
    model: str
    about: str
    card: Mapping[str, Any]
    parameters: int
    evaluations: Mapping[str, Acceptance]
    commands: Sequence[str]
    notes: Sequence[str] = ()


def write_card(folder: Path, text: CardText) -> Path:
    """Writes ``README.md`` into ``folder`` and returns it."""
    path = folder / "README.md"
    path.write_text(card_text(text, _bytes(folder)), encoding="utf-8")
    return path


def card_text(text: CardText, size: int) -> str:
    """The card as Markdown. ``size`` in bytes."""
    card, evaluations, commands, notes = text.card, text.evaluations, text.commands, text.notes
    lines = [
        f"# {text.title} head for {text.model}",
        "",
        f"{text.parameters / 1e6:.2f} M parameters, int8 per output row, {size / 1e6:.2f} MB; {text.about}",
        "",
        "Licence: Apache-2.0, as the target's, from whose weights it starts and on whose own text it was trained.",
        "",
        "## Training",
        "",
        *_table(("source of prompts", "samples", "answer tokens"), _sources(card)),
        "",
    ]
    facts = {
        "steps": card.get("steps"),
        "answer rows seen": card.get("tokens_seen"),
        "samples per step": card.get("batch"),
        "training-time-test steps": card.get("ttt_steps"),
        "peak learning rate": card.get("learning_rate"),
        "training time, s": card.get("training_seconds"),
        "mean loss of the last 50 steps": card.get("final_loss"),
        "answer tokens inside the draft vocabulary": card.get("draft_vocab_coverage"),
    }
    lines += [*_table(("", ""), [(name, value) for name, value in facts.items() if value is not None]), ""]
    lines += _curve(card.get("loss_curve") or ())
    lines += ["## Acceptance", "",
              "Measured on the int8 file, token by token, on greedy answers of the target to prompts not trained "
              "on; each position given that all before it were right.", ""]  # fmt: skip
    lines += [*_table(_header(evaluations), _acceptance_rows(evaluations)), ""]
    lines += ["## Reproduce", "", "```bash", *commands, "```", ""]
    lines += [*(f"* {note}" for note in notes), ""] if notes else []
    return "\n".join(lines)


def _sources(card: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    data: Mapping[str, Mapping[str, int]] = card.get("data", {})
    rows: list[tuple[Any, ...]] = [(name, one["samples"], one["answer_tokens"]) for name, one in sorted(data.items())]
    total = tuple(sum(one[key] for one in data.values()) for key in ("samples", "answer_tokens"))
    return [*rows, ("all", *total)]


def _header(evaluations: Mapping[str, Acceptance]) -> tuple[str, ...]:
    depth = max((len(one.top1) for one in evaluations.values()), default=0)
    positions = tuple(str(d + 1) for d in range(depth))
    return ("prompts", "answers", "tokens", "", *positions, f"chain of {depth}: tokens per verification")


def _acceptance_rows(evaluations: Mapping[str, Acceptance]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for name, one in evaluations.items():
        rows.append((name, one.samples, one.rows, "best", *(f"{x:.3f}" for x in one.top1), f"{one.chain_length:.2f}"))
        rows.append(("", "", "", "among best 4", *(f"{x:.3f}" for x in one.top4), ""))
    return rows


def _curve(points: Sequence[Sequence[float]]) -> list[str]:
    if not points:
        return []
    rows = [("step", *(str(int(step)) for step, _ in points)), ("loss", *(f"{loss:.2f}" for _, loss in points))]
    return [*_table(rows[0], rows[1:]), ""]


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != "README.md")
