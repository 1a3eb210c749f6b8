"""``pdspec doctor``: looks at this machine and at a deployment, and says what to do about what it finds."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pdspec.client import Access, RouterClient
from pdspec.errors import PdspecError, PeerLost
from pdspec.model.store import cache_root

PORTS = {50051: "router"}
NEEDED = ("torch", "ray", "grpcio", "protobuf", "numpy", "transformers", "tokenizers", "prometheus-client")
MIN_FREE_GB = 2.0
MAX_SKEW_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check. ``state`` is ok, warn or fail."""

    name: str
    state: str
    found: str
    remedy: str = ""


def run(*, endpoint: str = "", access: Access | None = None) -> dict[str, Any]:
    """The report; ``ok`` when nothing fails. ``endpoint`` empty: this machine alone."""
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _compiler, _memory, _cache, _ray_token]
    checks.append((lambda: _deployment(endpoint, access or Access())) if endpoint else _ports)
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except (OSError, PdspecError, subprocess.SubprocessError, importlib.metadata.PackageNotFoundError) as error:
            name = getattr(check, "__name__", "check").strip("_<>")
            findings.append(Finding(name=name, state="fail", found=str(error), remedy=getattr(error, "remedy", "")))
    return {"ok": all(found.state != "fail" for found in findings), "findings": [asdict(found) for found in findings]}


def _python() -> Iterator[Finding]:
    asked = importlib.metadata.metadata("pdspec")["Requires-Python"]
    found = sys.version.split()[0]
    fits = SpecifierSet(asked).contains(found, prereleases=True)
    yield Finding(name="python", state="ok" if fits else "fail", found=found, remedy=f"install Python {asked}")


def _packages() -> Iterator[Finding]:
    """Installed versions against what the package itself asks for."""
    try:
        asked = {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("pdspec") or [])}
    except importlib.metadata.PackageNotFoundError:
        remedy = "install it: pip install -e ."
        yield Finding(name="pdspec", state="warn", found="runs from a folder, not installed", remedy=remedy)
        asked = {}
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name=name, state="fail", found="not installed", remedy=f"pip install '{name}{asked.get(name, '')}'"
            )
            continue
        if name in asked and not asked[name].contains(version, prereleases=True):
            remedy = f"pip install '{name}{asked[name]}'"
            yield Finding(name=name, state="fail", found=f"{version}, asked for {asked[name]}", remedy=remedy)
        else:
            yield Finding(name=name, state="ok", found=version)


def _compiler() -> Iterator[Finding]:
    """The kernels are compiled at the first start."""
    name = os.environ.get("CC") or next((one for one in ("cc", "gcc", "clang") if shutil.which(one)), "")
    if not name or not shutil.which(name.split()[0]):
        yield Finding(name="compiler", state="fail", found="none", remedy="install gcc or clang, or name one in CC")
        return
    told = subprocess.run([*name.split(), "--version"], capture_output=True, text=True, timeout=20, check=False)
    if told.returncode:
        yield Finding(name="compiler", state="fail", found=f"{name} does not run", remedy="install gcc or clang")
    else:
        yield Finding(name="compiler", state="ok", found=told.stdout.splitlines()[0][:80])


def _memory() -> Iterator[Finding]:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) / 1e6
    state = "ok" if free >= MIN_FREE_GB else "warn"
    remedy = "" if state == "ok" else "end other programs, or lower worker.cache_tokens"
    yield Finding(name="memory", state=state, found=f"{free:.1f} GB available", remedy=remedy)


def _cache() -> Iterator[Finding]:
    folder = cache_root("")
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        remedy = "name a folder that can be written in PDSPEC_CACHE"
        yield Finding(name="cache", state="fail", found=f"{place} cannot be written", remedy=remedy)
    elif free < MIN_FREE_GB:
        remedy = "make room, or name another folder in PDSPEC_CACHE"
        yield Finding(name="cache", state="warn", found=f"{free:.1f} GB free in {place}", remedy=remedy)
    else:
        yield Finding(name="cache", state="ok", found=f"{free:.0f} GB free in {place}")


def _ray_token() -> Iterator[Finding]:
    """Ray asks for a token from 2.59 on; an embedded cluster brings its own."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding(name="ray token", state="ok", found="in RAY_AUTH_TOKEN")
    elif not path.exists():
        found = "none; an embedded cluster needs none of yours"
        yield Finding(name="ray token", state="ok", found=found, remedy="to join one: ray get-auth-token --generate")
    elif path.stat().st_mode & 0o077:
        yield Finding(name="ray token", state="warn", found=f"{path} is open to others", remedy=f"chmod 600 {path}")
    else:
        remedy = "if `pdspec up --address` is refused, copy the cluster's token there"
        yield Finding(name="ray token", state="ok", found=str(path), remedy=remedy)


def _ports() -> Iterator[Finding]:
    for port, who in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1.0)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken:
            remedy = f"a deployment? pdspec doctor --endpoint 127.0.0.1:{port}; else choose another with --port"
            yield Finding(name=f"port {port} ({who})", state="warn", found="something listens", remedy=remedy)
        else:
            yield Finding(name=f"port {port} ({who})", state="ok", found="free")


def _deployment(endpoint: str, access: Access) -> Iterator[Finding]:
    with RouterClient(endpoint, access) as client:
        try:
            workers = client.workers()
        except PeerLost as error:
            yield Finding(name="router", state="fail", found=error.message, remedy=error.remedy or "see its log")
            return
    yield Finding(name="router", state="ok", found=f"{endpoint}, {len(workers)} workers")
    if not any(worker["role"] == "decode" and worker["state"] == "ready" for worker in workers):
        yield Finding(name="decode workers", state="fail", found="none is ready", remedy="start one, see below for why")
    for worker in workers:
        name = worker["worker_id"] or worker["address"]
        if worker["state"] != "ready":
            remedy = _REMEDIES.get(worker["state"], "see its log")
            found = f"{worker['state']}: {worker['reason']}"
            yield Finding(
                name=name, state="warn" if worker["state"] == "draining" else "fail", found=found, remedy=remedy
            )
        else:
            yield Finding(name=name, state="ok", found=f"{worker['role']}, {worker['fingerprint'][:12]}")
    yield from _fingerprints(workers)
    yield from _lossy(workers)
    yield from _clocks(workers)


def _fingerprints(workers: list[dict[str, Any]]) -> Iterator[Finding]:
    held: dict[str, list[str]] = {}
    for worker in workers:
        if worker["fingerprint"]:
            held.setdefault(worker["fingerprint"][:12], []).append(worker["worker_id"] or worker["address"])
    if len(held) > 1:
        found = "; ".join(f"{digest}: {', '.join(names)}" for digest, names in held.items())
        remedy = "start all with the same model, dtype, numerics, wire_kv and heads"
        yield Finding(name="fingerprints", state="fail", found=found, remedy=remedy)
    elif held:
        yield Finding(name="fingerprints", state="ok", found=f"all hold {next(iter(held))}")


def _lossy(workers: list[dict[str, Any]]) -> Iterator[Finding]:
    """Settings that change what a model answers are never silent."""
    names = [w["worker_id"] or w["address"] for w in workers if w["metrics"].get("wire_kv_lossy")]
    if names:
        found = f"LOSSY: {', '.join(names)} round the KV of prompts on the wire; answers may differ from the model's"
        remedy = "start all with wire_kv whole where that matters"
        yield Finding(name="wire_kv", state="warn", found=found, remedy=remedy)


def _clocks(workers: list[dict[str, Any]]) -> Iterator[Finding]:
    """Deadlines travel as remaining time, so that clocks may differ; logs and spans are easier to read when not."""
    skews = {
        w["worker_id"] or w["address"]: w["metrics"]["clock"] - time.time() for w in workers if "clock" in w["metrics"]
    }
    if not skews:
        return
    name, worst = max(skews.items(), key=lambda pair: abs(pair[1]))
    if abs(worst) > MAX_SKEW_S:
        remedy = "run chrony or another NTP client there; logs and spans are out of order until then"
        yield Finding(name="clocks", state="warn", found=f"{name} is off by {worst:+.1f} s", remedy=remedy)
    else:
        yield Finding(name="clocks", state="ok", found=f"within {MAX_SKEW_S:g} s")


_REMEDIES = {
    "lost": "start it again; Ray does so by itself. Between two networks, try --handoff relay",
    "refused": "start it with the model, dtype, numerics, wire_kv and heads of the decode workers",
    "unknown": "wait: it has not answered yet; else look at its log",
    "draining": "it ends when its requests have; start another",
}
