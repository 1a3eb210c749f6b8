"""Prompts that studies and benchmarks run on; the default is the project's own example set."""

from __future__ import annotations

from pathlib import Path

from pdspec.errors import ConfigError
from pdspec.prompts import Prompt, load_prompts

__all__ = ["Prompt", "example_folder", "load_prompts", "study_prompts"]


def example_folder() -> Path:
    """``examples/prompts`` of the working tree this package is installed from. Raises ConfigError without one."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "prompts"
    if not folder.is_dir():
        raise ConfigError("the example prompts are not installed", field="prompts", remedy="give --prompts FILE")
    return folder


def study_prompts(path: str | Path | None = None, limit: int = 0) -> list[Prompt]:
    """The prompts of a file or folder, or the examples. ``limit`` > 0 takes that many, spread over the whole list, so
    that every category keeps its share."""
    prompts = load_prompts(path if path else example_folder())
    if 0 < limit < len(prompts):
        return [prompts[n * len(prompts) // limit] for n in range(limit)]
    return prompts
