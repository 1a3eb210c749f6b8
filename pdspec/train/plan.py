"""What is to be written: settings of a generation run, and which sample comes from which prompt. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pdspec.errors import ConfigError
from pdspec.prompts import Prompt, load_prompts

SELF = "self-synthesised"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to write. ``tokens`` counts answer tokens; ``max_answer``/``max_user`` are tokens of one turn."""

    out: Path
    tokens: int
    sources: tuple[tuple[str, tuple[Prompt, ...]], ...] = ()  # (name, prompts)
    self_share: float = 0.6  # of the samples, while files last; afterwards all
    temperature: float = 0.7
    user_temperature: float = 1.0
    user_min_p: float = 0.02
    max_answer: int = 400
    max_prompt: int = 2048  # longer ones are left out
    max_user: int = 160
    min_user: int = 6
    batch: int = 24
    seed: int = 0
    keep_hidden: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sample ``index``: a prompt, or None when the target writes the user's turn as well."""

    index: int
    source: str
    prompt: Prompt | None


def prompt_sources(files: Sequence[Path], holdout: int) -> tuple[tuple[str, tuple[Prompt, ...]], ...]:
    """Prompt files as sources, each without its last ``holdout`` prompts. Raises what ``load_prompts`` raises."""
    read = [(path.stem, load_prompts(path)) for path in files]
    return tuple((name, tuple(prompts[: len(prompts) - holdout] if holdout else prompts)) for name, prompts in read)


def plan(config: DataConfig) -> Iterator[Plan]:
    """All samples in order, without end: file prompts in a seeded shuffle until they are used up."""
    files = [(name, prompt) for name, prompts in config.sources for prompt in prompts]
    random.Random(config.seed).shuffle(files)
    taken, index = 0, 0
    if config.self_share <= 0 and not files:
        raise ConfigError(
            "no prompts, and no self-synthesised ones either",
            field="prompts",
            remedy="give --prompts FILE or a self_share above 0",
        )
    while config.self_share > 0 or taken < len(files):
        use_self = int((index + 1) * config.self_share) > int(index * config.self_share)
        if use_self or taken == len(files):
            if config.self_share > 0:
                yield Plan(index=index, source=SELF, prompt=None)
        else:
            yield Plan(index=index, source=files[taken][0], prompt=files[taken][1])
            taken += 1
        index += 1


def prompt_key(text: str) -> str:
    """Hash of a user turn, blind to case and spacing: equal keys are duplicates."""
    return xxhash.xxh3_64_hexdigest(" ".join(text.lower().split()).encode())
