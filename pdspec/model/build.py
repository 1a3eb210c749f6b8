"""Compile the CPU kernels once per machine into the cache folder.

The library's name carries a hash of sources, compiler and CPU, so a cache shared between machines never hands
one machine's code to another.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from pdspec.errors import ConfigError
from pdspec.model.store import cache_root

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")


class NoCompiler(ConfigError):
    """No C compiler here: the torch operations serve instead (slower, said once)."""


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise NoCompiler("no C compiler found for the CPU kernels", remedy="install gcc or clang, or set CC")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def chosen_flags() -> tuple[str, ...]:
    """``FLAGS``, and what ``PDSPEC_KERNEL_FLAGS`` adds: ``-DPDSPEC_NO_DOTS`` multiplies bf16 weights with float32
    activations where the CPU has bf16 instructions (AVX-512 BF16), too, as all other CPUs do."""
    return (*FLAGS, *os.environ.get("PDSPEC_KERNEL_FLAGS", "").split())


def kernel_hash(flags: tuple[str, ...] | None = None) -> str:
    """Hash of sources, flags, compiler version and CPU: the kernel part of a worker's fingerprint."""
    flags = chosen_flags() if flags is None else flags
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.read_bytes())
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    for part in (version, " ".join(flags).encode(), _cpu().encode()):
        digest.update(part)
    return digest.hexdigest()[:16]


def load_kernels(*extra_flags: str) -> ctypes.CDLL:
    """The compiled library, built on first use (about two seconds). Raises ``NoCompiler``, ``ConfigError``."""
    folder, flags = cache_root() / "kernels", (*chosen_flags(), *extra_flags)
    path = folder / f"pdk-{kernel_hash(flags)}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(path, flags)
        except OSError as error:
            raise ConfigError(
                f"cannot write {folder}: {error}", field="cache_dir", remedy="set PDSPEC_CACHE"
            ) from error
    return ctypes.CDLL(str(path))


def _compile(path: Path, flags: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as temp:
        built = Path(temp) / path.name
        command = [_compiler(), *flags, "-o", str(built), *sorted(map(str, SOURCES.glob("*.c"))), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise NoCompiler(f"the CPU kernels do not compile: {result.stderr.strip()[:500]}", remedy="try another CC")
        os.replace(built, path)
