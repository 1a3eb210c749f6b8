"""Lookahead decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdspec.errors import ConfigError
from pdspec.spec.family import Description, Parts, Setting
from pdspec.types import CacheGroup

if TYPE_CHECKING:
    from pdspec.spec.protocol import Drafter

DESCRIPTION = Description(
    name="lookahead", summary="n-grams of the target's own guesses at the tokens ahead, made in the same forwards",
    needs="", ships="", trees=("chain", "dynamic"), default_tree="dynamic(4,7,28)",
    source="Fu et al. 2024, Lookahead Decoding, arXiv 2402.02057",
    options={"window": "7", "level": "5", "guesses": "7", "text": "on"},
)
_LIMITS = {"window": (1, 64), "level": (3, 16), "guesses": (1, 64)}


def groups(setting: Setting) -> tuple[CacheGroup, ...]:
    """No KV of its own. Raises ConfigError for an option out of range."""
    _numbers(setting)
    return ()


def make(setting: Setting, parts: Parts) -> Drafter:
    """Needs the target's context length alone."""
    from pdspec.spec.lookahead.drafter import LookaheadDrafter

    window, level, guesses = _numbers(setting)
    return LookaheadDrafter(
        window=window, level=level, guesses=guesses, text=setting.option(DESCRIPTION, "text") == "on",
        max_positions=setting.target.config.max_context,
    )


def _numbers(setting: Setting) -> tuple[int, int, int]:
    found = []
    for name, (low, high) in _LIMITS.items():
        text = setting.option(DESCRIPTION, name)
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ConfigError(f"{text!r} is no number in {low}..{high}", field=f"options.lookahead:{name}",
                              remedy="see pdspec drafters")
        found.append(int(text))
    if (text := setting.option(DESCRIPTION, "text")) not in ("on", "off"):
        raise ConfigError(f"{text!r} is neither on nor off", field="options.lookahead:text", remedy="use on or off")
    window, level, guesses = found
    if (level - 1) * (window + guesses) > 256:
        raise ConfigError(f"{(level - 1) * (window + guesses)} rows in one forward", field="options.lookahead:window",
                          remedy="keep (level - 1) * (window + guesses) at 256 or below")
    return window, level, guesses
