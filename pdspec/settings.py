"""Machinery of frozen config classes: declare, check, load from YAML or TOML, read from command-line flags.

A config class is a frozen keyword-only dataclass derived from ``Settings`` whose fields are made by ``option``.
Field types are limited to ``str``, ``int``, ``float``, ``bool``, ``tuple[str, ...]``, ``dict[str, str]``,
``dict[str, float]`` and other ``Settings`` classes. Everything wrong is a ``ConfigError`` that names the field.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_type_hints

import yaml

from pdspec.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in Python takes seconds for 6,000 brackets
_SHORT = reprlib.Repr()  # a value of YAML may hold itself a billion times
_SHORT.maxlevel = 2
_show = _SHORT.repr


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field with what a flag needs. ``low`` and ``high`` are inclusive bounds of a number."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of the config classes: every value is checked on construction."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _convert(getattr(self, field.name), hints[field.name], field.name)
            _check_value(value, field)
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as a config file gives them. Raises ConfigError for an unknown key, with the
        nearest known name, and for a value of the wrong type or range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name("key", str(key), known, where=cls.__name__)
        hints = get_type_hints(cls)
        return cls(**{key: _convert(value, hints[key], key) for key, value in values.items()})

    @classmethod
    def load(cls, path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Self:
        """Values of the file at ``path`` (none: the defaults), then ``overrides`` on top of them."""
        values = dict(read_file(path)) if path else {}
        return cls.from_mapping({**values, **(overrides or {})})

    @classmethod
    def from_args(cls, argv: Sequence[str], *, prog: str, description: str = "") -> Self:
        """Parse ``--config FILE`` and one flag per field (flags win). Exits with status 2 on an unknown flag."""
        parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
        parser.add_argument("--config", metavar="FILE", default="", help="YAML or TOML file with these settings")
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _add_flag(parser, field, hints[field.name])
        given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
        values = dict(read_file(path)) if (path := given.pop("config")) else {}
        for name, value in given.items():
            section, dot, key = name.partition(".")
            inner = values.get(section) or {}
            values[section] = {**inner, key: value} if dot and isinstance(inner, Mapping) else value
        return cls.from_mapping(values)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked like any."""
        return dataclasses.replace(self, **changes)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values that ``from_mapping`` takes back."""
        return dataclasses.asdict(self)


def unknown_name(kind: str, name: str, known: Sequence[str], *, field: str = "", where: str = "") -> ConfigError:
    """The refusal of a name that does not exist, with the nearest one that does. ``field`` is ``name`` by default."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
    place = f" of {where}" if where else ""
    return ConfigError(f"unknown {kind} {name!r}{place}", field=field or name, remedy=remedy)


def read_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a ``.yaml``, ``.yml``, ``.toml`` or ``.json`` file. Raises ConfigError naming the file."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            message = f"{path} is larger than {MAX_FILE_BYTES} bytes"
            raise ConfigError(message, field="config", remedy="name a file of settings")
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, Loader=_LOADER)
    except OSError as error:
        remedy = "name a file that can be read"
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="config", remedy=remedy) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: TOML, no UTF-8, no date, 5,000 digits
        message = f"{path} does not parse: {str(error)[:400]}"
        raise ConfigError(message, field="config", remedy="mend the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping", field="config", remedy="write 'key: value' lines")
    return values


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, prefix: str = "") -> None:
    if isinstance(kind, type) and issubclass(kind, Settings):
        hints = get_type_hints(kind)
        for inner in dataclasses.fields(kind):
            _add_flag(parser, inner, hints[inner.name], prefix=f"{field.name}.")
        return
    dest, text = f"{prefix}{field.name}", field.metadata.get("help", "")
    flag = "--" + dest.replace("_", "-").replace(".", "-")
    default = field.default if field.default is not dataclasses.MISSING else "required"
    help_text = f"{text} (default: {','.join(default) if isinstance(default, tuple) else default})".replace("%", "%%")
    if kind is bool:
        parser.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=help_text)
    elif str(kind).startswith("dict"):
        parser.add_argument(flag, dest=dest, metavar="NAME=VALUE,...", default=None, help=text)
    else:
        names = field.metadata.get("choices") or None
        meta = "|".join(names) if names else flag.removeprefix("--").replace("-", "_").upper()
        parser.add_argument(flag, dest=dest, metavar=meta, default=None, help=help_text)


def _convert(value: Any, kind: Any, name: str) -> Any:
    """``value`` as ``kind``; text is parsed, since flags are text. Raises ConfigError."""
    if isinstance(kind, type) and issubclass(kind, Settings):
        return kind.from_mapping(value) if isinstance(value, Mapping) else _instance(value, kind, name)
    try:
        if str(kind).startswith("tuple"):
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(_text(part).strip() for part in parts if part)
        if str(kind).startswith("dict"):
            item = float if "float" in str(kind) else (lambda entry: entry) if "Any" in str(kind) else _text
            pairs = dict(_pair(part) for part in value.split(",") if part) if isinstance(value, str) else value
            return {_text(key): item(entry) for key, entry in pairs.items()}
        if kind is bool:
            return _boolean(value)
        if kind is int and (isinstance(value, bool) or (isinstance(value, float) and not value.is_integer())):
            raise ValueError(value)
        if kind is str:
            return _text(value)
        return kind(value)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        wanted = getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
        remedy = f"give a value of type {wanted}"
        raise ConfigError(f"{_show(value)} is no {wanted}", field=name, remedy=remedy) from error


def _instance(value: Any, kind: type, name: str) -> Any:
    if isinstance(value, kind):
        return value
    raise ConfigError(f"{_show(value)} is no mapping", field=name, remedy=f"give the keys of {kind.__name__}")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise ValueError(value)


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        raise ValueError(text)
    return name.strip(), value.strip()


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(value)


def _check_value(value: Any, field: dataclasses.Field) -> None:
    choices, low, high = (field.metadata.get(key) for key in ("choices", "low", "high"))
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "choose one of " + ", ".join(choices)
        raise ConfigError(f"unknown value {_show(value)}", field=field.name, remedy=remedy)
    if low is not None and not value >= low:
        raise ConfigError(f"{_show(value)} is below {low}", field=field.name, remedy=f"give at least {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{_show(value)} is above {high}", field=field.name, remedy=f"give at most {high}")
