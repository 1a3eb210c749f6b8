"""Flags that several commands share, and the cluster config they add up to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pdspec.client import Access
from pdspec.config import DTYPES, HANDOFFS, NUMERICS, ROLES, ClusterConfig, TlsConfig, WorkerConfig
from pdspec.errors import ConfigError, InvalidRequest
from pdspec.settings import read_file, unknown_name
from pdspec.wire.trust import TokenFile


def _choice(names: tuple[str, ...], default: str) -> str:
    return f"{' | '.join(names)} (default: {default})"


Model = Annotated[str | None, typer.Option(help="Alias, hub id or folder; see `pdspec models`.")]
Drafter = Annotated[str | None, typer.Option(help="See `pdspec drafters`.")]
Tree = Annotated[str | None, typer.Option(help="Draft tree, e.g. chain(4) or dynamic(4,4,8).")]
Dtype = Annotated[str | None, typer.Option(help=_choice(DTYPES, "bfloat16"))]
Numerics = Annotated[str | None, typer.Option(help=_choice(NUMERICS, "exact"))]
HandoffPath = Annotated[str | None, typer.Option("--handoff", help=_choice(HANDOFFS, "direct"))]
DraftPrefillRole = Annotated[str | None, typer.Option("--draft-prefill", help=_choice(ROLES, "prefill"))]
Heads = Annotated[
    list[str] | None,
    typer.Option("--head", help="DRAFTER=FOLDER, or eagle3=random:SEED: a draft head; may be repeated."),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="FAMILY:OPTION=VALUE of a draft family, see `pdspec drafters`; may be repeated."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="File or module of a drafter, see docs/adding-a-drafter.md; may be repeated."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of a worker; 0: all cores.")]
Endpoint = Annotated[str, typer.Option(help="The router's host:port.", envvar="PDSPEC_ENDPOINT")]
TlsCa = Annotated[
    str, typer.Option("--tls-ca", help="Authority of the deployment's certificates (PEM).", envvar="PDSPEC_TLS_CA")
]
TlsCert = Annotated[
    str, typer.Option("--tls-cert", help="Your certificate, where the router asks for one.", envvar="PDSPEC_TLS_CERT")
]
TlsKey = Annotated[str, typer.Option("--tls-key", help="The key of --tls-cert.", envvar="PDSPEC_TLS_KEY")]
TokenFlag = Annotated[
    str, typer.Option("--token-file", help="File with your token (or PDSPEC_TOKEN).", envvar="PDSPEC_TOKEN_FILE")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Prompts = Annotated[str | None, typer.Option(help="JSON lines of prompts (default: the project's own set).")]
Port = Annotated[int | None, typer.Option(help="Of the router; 0: any free one (default: 50051).")]
Config = Annotated[Path | None, typer.Option(help="YAML or TOML file of cluster settings; flags win.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of the config, e.g. worker.cache_tokens=8192; may be repeated."),
]
DEFAULT_ENDPOINT = "127.0.0.1:50051"


def cluster_config(
    *,
    config: Path | None = None,
    sets: list[str] | None = None,
    top: dict[str, Any] | None = None,
    worker: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    http: dict[str, Any] | None = None,
) -> ClusterConfig:
    """File, then ``--set``, then flags (None: not given). Raises ConfigError."""
    values: dict[str, Any] = dict(read_file(config)) if config else {}
    for text in sets or []:
        _assign(values, text)
    for section, flags in (("worker", worker), ("router", router), ("http", http)):
        given = _given(flags)
        if given:
            values[section] = {**(values.get(section) or {}), **given}
    if isinstance(chosen := values.get("worker"), dict):
        values["worker"] = _with_plugged(chosen)
    return ClusterConfig.from_mapping({**values, **_given(top)})


def worker_flags(
    *,
    model: str | None = None,
    drafter: str | None = None,
    dtype: str | None = None,
    numerics: str | None = None,
    tree: str | None = None,
    draft_prefill: str | None = None,
    heads: list[str] | None = None,
    options: list[str] | None = None,
    threads: int | None = None,
    plugins: list[str] | None = None,
) -> dict[str, Any]:
    """The ``worker`` section of these flags."""
    folders = pairs(heads, "head", "DRAFTER=FOLDER")
    return {
        "model": _absolute(model) if model else model,
        "drafter": drafter,
        "dtype": dtype,
        "numerics": numerics,
        "tree": tree,
        "draft_prefill": draft_prefill,
        "threads": threads,
        "options": pairs(options, "option", "FAMILY:OPTION=VALUE") or None,
        "heads": {name: _absolute(head) for name, head in folders.items()} or None,
        "plugins": tuple(plugins or ()) or None,
    }


def access(*, tls_ca: str = "", tls_cert: str = "", tls_key: str = "", token_file: str = "") -> Access:
    """What these flags show to a router; a token is never a flag, since process lists show flags."""
    token = TokenFile(token_file, field="--token-file").first() if token_file else os.environ.get("PDSPEC_TOKEN", "")
    return Access(tls=TlsConfig(ca=tls_ca, cert=tls_cert, key=tls_key), token=token)


def given_flags(**flags: Any) -> dict[str, Any]:
    """``worker_flags`` without those that were not given: keys of a WorkerConfig."""
    return _given(worker_flags(**flags))


def _with_plugged(worker: dict[str, Any]) -> dict[str, Any]:
    """The families of plug-ins are held ready where ``drafters`` does not say which are. Raises ConfigError."""
    if not worker.get("plugins") or "drafters" in worker:
        return worker
    from pdspec.spec.plugins import family_of

    known = WorkerConfig.from_mapping({"plugins": worker["plugins"]})
    return {**worker, "drafters": (*known.drafters, *(family_of(one).DESCRIPTION.name for one in known.plugins))}


def pairs(texts: list[str] | None, flag: str, form: str) -> dict[str, str]:
    """What a flag that may be repeated says, e.g. ``--head DRAFTER=FOLDER``. Raises ConfigError."""
    return dict(_split(text, flag, form) for text in texts or [])


def numbers(text: str, field: str) -> list[int]:
    """Comma separated whole numbers above 0. Raises InvalidRequest."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise InvalidRequest(f"{text!r} are no numbers", field=field, remedy="e.g. 512,2048")
    return [int(part) for part in parts]


def _absolute(name: str) -> str:
    """A folder's whole path, since workers run in folders of their own; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def _given(flags: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (flags or {}).items() if value is not None}


def _assign(values: dict[str, Any], text: str) -> None:
    key, value = _split(text, "set", "KEY=VALUE")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise unknown_name("section", section, ("worker", "router", "prefill_worker", "decode_worker"))
    values[name] = value


def _split(text: str, flag: str, form: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"{text!r} is no {form}", field=f"--{flag}", remedy=f"write --{flag} {form}")
    return name.strip(), value.strip()


def default_model() -> str:
    """Of every command that is given none."""
    return WorkerConfig().model
