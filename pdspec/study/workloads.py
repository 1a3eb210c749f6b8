"""Prompt sets by name: those of this project, and public ones that ``pdspec data fetch`` brings.

``repetitive`` is for what drafting from the prompt is for: the answer is a text of the prompt with a small change."""

from __future__ import annotations

from pathlib import Path

from pdspec.model.store import cache_root
from pdspec.settings import unknown_name
from pdspec.study.datasets import SETS, fetch
from pdspec.study.prompts import example_folder

REPETITIVE = "repetitive"
_FOLDER = Path(__file__).parent / "sets"
_ALIASES = {"math": "word_problems"}


def names() -> tuple[str, ...]:
    """All that ``workload`` takes."""
    own = sorted(path.stem for path in example_folder().glob("*.jsonl"))
    return (REPETITIVE, *own, *_ALIASES, *SETS)


def workload(name: str, cache_dir: str | None = None) -> str:
    """The set's file; a public one is downloaded unless it is in the cache folder. Raises ConfigError."""
    if name == REPETITIVE:
        return str(_FOLDER / "repetitive.jsonl")
    if name in SETS:
        kept = cache_root(cache_dir) / "data" / f"{name}.jsonl"
        return str(kept if kept.exists() else fetch(name, cache_dir=cache_dir)[0])
    path = example_folder() / f"{_ALIASES.get(name, name)}.jsonl"
    if not path.exists():
        raise unknown_name("workload", name, names(), field="--workload")
    return str(path)
