"""Options of draft families as values. Each raises ConfigError naming the option and the values it may have."""

from __future__ import annotations

from pdspec.errors import ConfigError
from pdspec.spec.family import Description, Setting

# What FeatureDrafter can do either way, with its defaults.
FEATURE_OPTIONS = {"stable_kv": "true", "first_token_padding": "false"}


def flag(setting: Setting, family: Description, name: str) -> bool:
    """true or false."""
    value = setting.option(family, name)
    if value not in ("true", "false"):
        raise _wrong(family, name, value, "set it to true or false")
    return value == "true"


def probability(setting: Setting, family: Description, name: str) -> float:
    """A number in 0..1."""
    value = setting.option(family, name)
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise _wrong(family, name, value, "set it to a number in 0..1")
    return number


def _wrong(family: Description, name: str, value: str, remedy: str) -> ConfigError:
    return ConfigError(f"{family.name}:{name} is {value!r}", field=f"options.{family.name}:{name}", remedy=remedy)
