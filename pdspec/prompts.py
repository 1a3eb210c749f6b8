"""Prompt files: JSON Lines in three public forms, told apart by their keys. Standard library only.

{"id": ..., "category": ..., "prompt": ...}            this project's examples
{"question_id": ..., "category": ..., "turns": [...]}  MT-bench (most commands use the first turn)
{"question": ..., "answer": ...}                       GSM8K (the answer is not read)
{"task_id": ..., "prompt": ...}                        HumanEval
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdspec.errors import ConfigError

REMEDY = "give a JSON Lines file with prompt, turns or question in every line"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One user turn, and those that the file has behind it. ``id`` is unique within its file, ``category`` may be
    empty."""

    id: str
    category: str
    text: str
    later: tuple[str, ...] = ()


def load_prompts(path: str | Path) -> list[Prompt]:
    """Every prompt of a file, or of the ``*.jsonl`` files of a folder in order of name, in file order.

    Raises ConfigError naming file and line for what is missing, malformed, empty or has an id twice.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"no *.jsonl file in {path}", field="prompts", remedy=REMEDY)
    prompts = [prompt for file in files for prompt in _read(file)]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ConfigError(f"two prompts of {path} have the id {prompt.id!r}", field="prompts", remedy=REMEDY)
        seen.add(prompt.id)
    return prompts


def _read(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="prompts", remedy=REMEDY) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: {error}", field="prompts", remedy=REMEDY) from error
        prompts.append(_prompt(record, f"{path.stem}-{number}", where))
    if not prompts:
        raise ConfigError(f"{path} holds no prompt", field="prompts", remedy=REMEDY)
    return prompts


def _prompt(record: Any, default_id: str, where: str) -> Prompt:
    turns: Any = None
    if isinstance(record, Mapping):
        first = record.get("prompt") or record.get("question")
        turns = [first] if first else record.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(one, str) and one.strip() for one in turns):
        raise ConfigError(f"{where}: no prompt", field="prompts", remedy=REMEDY)
    one = next((record[key] for key in ("id", "question_id", "task_id") if record.get(key) is not None), default_id)
    return Prompt(id=str(one), category=str(record.get("category", "")), text=turns[0], later=tuple(turns[1:]))
