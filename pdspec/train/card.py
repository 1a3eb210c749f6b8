"""A head's card: ``README.md`` beside its weights, written from what ``config.json`` records of it.

family, model, about, parameters, command     what was trained, and how
data, steps, loss_curve, ...                  the run's figures
acceptance                                    position by position, on answers held out
evaluations                                   the same on other prompts, by name, with the command of each
served                                        rows of ``pdspec study acceptance``, with its settings
notes                                         what the figures do not say
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdspec.errors import ConfigError
from pdspec.spec.heads import read_head_json
from pdspec.train.curve import loss_svg

CURVE = "loss.svg"
CONFIG = "config.json"
_TEXTS = ("README.md", CURVE)
_SERVED = ("tree", "temperature", "acceptance_length", "acceptance_per_position", "repeated_8gram_share")
Card = Mapping[str, Any]


def write_curve(folder: Path, points: Sequence[Sequence[float]]) -> None:
    """Writes the picture of a loss curve."""
    (folder / CURVE).write_text(loss_svg(points), encoding="utf-8")


def write_card(folder: Path) -> Path:
    """Writes ``README.md`` into a head's ``folder`` and returns it. Raises CheckpointError."""
    card: Card = (read_head_json(folder).get("pdspec") or {}).get("card") or {}
    path = folder / "README.md"
    path.write_text(card_text(card, _bytes(folder), curve=(folder / CURVE).exists()), encoding="utf-8")
    return path


def add_to_card(folder: Path, **values: Any) -> None:
    """Sets entries of the card that ``config.json`` records; those that are mappings are merged. Raises
    CheckpointError, and ConfigError for a head that is not ours."""
    found = read_head_json(folder)
    if "pdspec" not in found:
        raise ConfigError(f"{folder} holds a head without a card", field="head", remedy="train one with pdspec train")
    card = found["pdspec"].setdefault("card", {})
    for name, value in values.items():
        card[name] = {**card.get(name, {}), **value} if isinstance(value, Mapping) else value
    path = folder / CONFIG
    path.with_suffix(".new").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)


def served_rows(study: Mapping[str, Any], drafter: str) -> list[dict[str, Any]]:
    """What a card keeps of a result of ``pdspec study acceptance``. Raises ConfigError where ``drafter`` is not in
    it."""
    rows = [
        {**{name: row[name] for name in _SERVED}, "prompts": study["prompts"], "max_tokens": study["max_tokens"]}
        for row in study.get("families", ()) if row["drafter"] == drafter
    ]  # fmt: skip
    if not rows:
        raise ConfigError(
            f"no row of {drafter}", field="served", remedy=f"run pdspec study acceptance --drafters {drafter} --json"
        )
    return rows


def card_text(card: Card, size: int, *, curve: bool) -> str:
    """The card as Markdown. ``size``: bytes of the head's files; ``curve``: whether there is a picture."""
    title, model = card.get("title", "Draft"), card.get("model", "its target")
    lines = [
        f"# {title} head for {model}", "",
        f"{card.get('parameters', 0) / 1e6:.2f} M parameters, int8 per output row, {size / 1e6:.2f} MB;"
        f" {card.get('about', '')}", "",
        "Licence: Apache-2.0, as the target's, from whose weights it starts and on whose own text it was trained.", "",
        "## Training", "", *_table(("source of prompts", "samples", "answer tokens", "share"), _sources(card)), "",
    ]  # fmt: skip
    facts = {
        "steps": card.get("steps"),
        "answer rows seen": card.get("tokens_seen"),
        "samples per step": card.get("batch"),
        "training-time-test steps": card.get("ttt_steps"),
        "loss": card.get("loss"),
        "optimiser": card.get("optimiser"),
        "matrix products in": card.get("precision"),
        "peak learning rate": card.get("learning_rate"),
        "training time, s": card.get("training_seconds"),
        "mean loss of the last 50 steps": card.get("final_loss"),
        "answer tokens inside the draft vocabulary": card.get("draft_vocab_coverage"),
    }
    lines += [*_table(("", ""), [(name, value) for name, value in facts.items() if value is not None]), ""]
    lines += [f"![loss by step]({CURVE})", ""] if curve else _curve(card.get("loss_curve") or ())
    lines += _evaluations(card)
    lines += _served(card.get("served") or ())
    lines += ["## Reproduce", "", "```bash", *dict.fromkeys(_commands(card)), "```", ""]
    notes = card.get("notes") or ()
    lines += [*(f"* {note}" for note in notes), ""] if notes else []
    return "\n".join(lines)


def _commands(card: Card) -> Iterable[str]:
    yield from [card["command"]] if card.get("command") else []
    for one in (card.get("evaluations") or {}).values():
        yield from [one["command"]] if one.get("command") else []
    yield from card.get("served_commands") or ()


def _sources(card: Card) -> list[tuple[Any, ...]]:
    data: Mapping[str, Mapping[str, Any]] = card.get("data", {})
    tokens = sum(one["answer_tokens"] for one in data.values())
    rows: list[tuple[Any, ...]] = [
        (name, one["samples"], one["answer_tokens"], f"{one['answer_tokens'] / max(1, tokens):.1%}")
        for name, one in sorted(data.items())
    ]
    return [*rows, ("all", sum(one["samples"] for one in data.values()), tokens, "")]


def _evaluations(card: Card) -> list[str]:
    found = {**({"held out": card["acceptance"]} if card.get("acceptance") else {}), **(card.get("evaluations") or {})}
    if not found:
        return []
    depth = max(len(one["top1"]) for one in found.values())
    header = ("prompts", "answers", "tokens", "in repeated 8-grams", "", *(str(d + 1) for d in range(depth)),
              f"chain of {depth}: tokens per verification")  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for name, one in found.items():
        repeated = f"{one['repeated']:.1%}" if "repeated" in one else ""
        rows.append((name, one["samples"], one["rows"], repeated, "best", *(f"{x:.3f}" for x in one["top1"]),
                     f"{one['chain_length']:.2f}"))  # fmt: skip
        rows.append(("", "", "", "", "among best 4", *(f"{x:.3f}" for x in one["top4"]), ""))
    return ["## Acceptance", "",
            "Measured on the int8 file, token by token, on answers of the target to prompts not trained on (greedy "
            "where no temperature is named); each position given that all before it were right.", "",
            *_table(header, rows), ""]  # fmt: skip


def _served(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    depth = max(len(row["acceptance_per_position"]) for row in rows)
    header = ("tree", "T", "prompts x tokens", "output tokens per verification", "in repeated 8-grams",
              *(str(d + 1) for d in range(depth)))  # fmt: skip
    lines = [
        (row["tree"], f"{row['temperature']:g}", f"{row['prompts']} x {row['max_tokens']}",
         f"{row['acceptance_length']:.2f}", f"{row['repeated_8gram_share']:.1%}",
         *(f"{x:.3f}" for x in row["acceptance_per_position"]))
        for row in rows
    ]  # fmt: skip
    return ["Served through the handoff (`pdspec study acceptance`); acceptance at each depth of the verifications "
            "that reached it:", "", *_table(header, [(*row, *[""] * (len(header) - len(row))) for row in lines]),
            ""]  # fmt: skip


def _curve(points: Sequence[Sequence[float]]) -> list[str]:
    if not points:
        return []
    rows = [("step", *(str(int(step)) for step, _ in points)), ("loss", *(f"{loss:.2f}" for _, loss in points))]
    return [*_table(rows[0], rows[1:]), ""]


def _table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + " --- |" * len(header)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name not in _TEXTS)
