"""Pages of the docs site that are written by what they describe: every command and flag, every setting.

``mkdocs.yml`` names this file as a hook; ``python -m pdspec.cli.reference`` prints the first page.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import typer

from pdspec import config as settings
from pdspec.cli.app import build_app

_COMMANDS = """# Command line

Every command that measures or proves takes `--json` and prints exactly one object; logs and progress go to stderr. Exit
status: 0; 1 where a check or a promise fails; 2 where what was asked is wrong.
"""
_SETTINGS = """# Settings

Keys of a YAML or TOML file (`pdspec up --config FILE`), of `--set KEY=VALUE` (`--set worker.cache_tokens=8192`), and
flags of a role that runs alone: `python -m prefill_worker`, `python -m decode_worker`, `python -m router`,
`python -m router.relay` and `python -m pdspec.gateway` take `--cache-tokens` for `cache_tokens`, `--tls-cert` for
`tls.cert`. A key that does not exist is refused with the nearest one that does.
"""
_SECTIONS = (
    ("The deployment", settings.ClusterConfig), ("worker, prefill_worker, decode_worker", settings.WorkerConfig),
    ("router", settings.RouterConfig), ("http", settings.HttpConfig), ("tls, of any of them", settings.TlsConfig),
)  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks for the files of the site."""
    from mkdocs.structure.files import File

    for name, page in (("cli.md", reference()), ("settings.md", settings_page())):
        files.append(File.generated(config, name, content=page))
    return files


def settings_page() -> str:
    """Every key with its default."""
    parts = [_SETTINGS]
    for title, kind in _SECTIONS:
        parts.append(f"## {title}\n\n| key | default | what |\n| --- | --- | --- |")
        for field in dataclasses.fields(kind):
            if text := field.metadata.get("help", ""):
                choices = " | ".join(field.metadata.get("choices") or ())
                what = f"{text} ({choices})" if choices else text
                parts.append(f"| `{field.name}` | {_value(_default_of(field))} | {_cell(what)} |")
        parts.append("")
    return "\n".join(parts)


def _default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def reference() -> str:
    """Every command with its flags."""
    parts = [_COMMANDS]
    for path, command in commands(typer.main.get_command(build_app()), "pdspec"):
        parts.append(_section(path, command))
    return "\n".join(parts)


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(name as typed, click command) of all that can be run, in the order of ``--help``."""
    inner = getattr(command, "commands", {})
    if not inner or command.invoke_without_command:
        yield path, command
    for name, sub in inner.items():
        yield from commands(sub, f"{path} {name}")


def _section(path: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not getattr(one, "hidden", False)]
    usage = " ".join([path, *(_shown(one) for one in arguments)])
    lines = [f"## `{usage}`", "", " ".join((command.help or "").split()), ""]
    rows = [(f"`{_shown(one)}`", "", one.help or "") for one in arguments]
    rows += [(_flags(one), _default(one), one.help or "") for one in options]
    if rows:
        lines += ["| flag | default | what |", "| --- | --- | --- |"]
        lines += [f"| {flag} | {default} | {_cell(text)} |" for flag, default, text in rows]
        lines.append("")
    return "\n".join(lines)


def _shown(argument: Any) -> str:
    name = str(argument.name).upper()
    return name if argument.required else f"[{name}]"


def _flags(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return f"{names} (`{option.envvar}`)" if isinstance(option.envvar, str) else names


def _default(option: Any) -> str:
    return "" if callable(option.default) else _value(option.default)


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        value = ",".join(value)
    return "" if value in (None, False, "", {}) else f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(reference())
