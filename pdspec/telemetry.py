"""Logs with request ids on stderr, and what a measurement has to say of the machine it was made on.

Standard library only: the router uses it, and the router has no torch.
"""

from __future__ import annotations

import contextvars
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
_PACKAGES = ("pdspec", "torch", "ray", "grpcio", "protobuf", "numpy", "transformers", "tokenizers")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


class _RequestFilter(logging.Filter):
    """Gives every record the id of the request that its task serves, unless it carries one."""

    def filter(self, record: logging.LogRecord) -> bool:
        request_id = getattr(record, "request_id", "") or REQUEST_ID.get()
        record.request_id = request_id
        record.request = f" [{request_id}]" if request_id else ""
        return True


class _JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, worker, logger, request_id, message, and error with a traceback."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        values = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "worker": self._worker,
            "logger": record.name,
            "request_id": getattr(record, "request_id", ""),
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in values.items() if value}, ensure_ascii=False)


def setup_logging(level: str = "info", *, name: str = "", log_format: str = "text") -> None:
    """Send records of ``level`` and above to stderr, each with time, ``name`` (a worker's) and request id, as ``text``
    or one ``json`` object a line.

    Replaces the root handlers that were there. Set ``REQUEST_ID`` in a task, or pass ``extra={"request_id": …}``.
    """
    handler = logging.StreamHandler(sys.stderr)
    who = f" {name}" if name else ""
    text = logging.Formatter(f"%(asctime)s %(levelname)s{who} %(name)s%(request)s: %(message)s")
    handler.setFormatter(_JsonLines(name) if log_format == "json" else text)
    handler.addFilter(_RequestFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3", "filelock", "huggingface_hub", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, instruction sets, memory in GB and NVIDIA GPUs of this machine."""
    text = _read("/proc/cpuinfo")
    flags = (_field(text, "flags") or _field(text, "Features")).split()
    return {
        "cpu": _field(text, "model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [
            _field(_read(info), "Model") for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        ],
        "system": f"{platform.system()} {platform.release()}",
    }


def core_ids() -> tuple[int, ...]:
    """Cores that this process may run on, ascending."""
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return tuple(sorted(known))


def usable_cores() -> int:
    """How many these are."""
    return len(core_ids())


def clock_name() -> str:
    """Names the machine's ``time.monotonic()``: processes that agree on it read one clock. Empty where unknown."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a figure may depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # no such file on this kind of machine: the caller then says less
        return ""


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
