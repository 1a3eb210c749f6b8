"""The cache folder: built once, renamed into place whole, checked by checksum on every later start.

<root>/models/<name>/          the checkpoint and manifest.json
<root>/models/.<name>-*/       being built; a killed build leaves one, the next build removes it
<root>/models/.<name>.lock     held while building, so that workers started together convert once
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pdspec.errors import ConfigError
from pdspec.model.fingerprint import file_hash

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """``cache_dir``, else the environment's PDSPEC_CACHE, else ``~/.cache/pdspec``."""
    return Path(cache_dir or os.environ.get("PDSPEC_CACHE") or "~/.cache/pdspec").expanduser()


def ensure(root: Path, name: str, content_hash: str, build: Callable[[Path], None]) -> Path:
    """The folder of model ``name``, built by ``build(folder)`` unless a whole one of ``content_hash`` is there.

    ``build`` must write tensors of ``content_hash`` or raise. A damaged copy is rebuilt, with a warning. Raises
    ConfigError when the cache cannot be written (only when it must be).
    """
    parent = root / "models"
    folder = parent / name
    if not damage(folder, content_hash):
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _lock(parent / f".{name}.lock"):
            reason = damage(folder, content_hash)  # another process may have built it meanwhile
            if reason:
                if folder.exists():
                    log.warning("the copy of %s in %s is not usable (%s); building it again", name, folder, reason)
                _build(parent, folder, content_hash, build)
    except OSError as error:
        raise ConfigError(
            f"cannot write the model cache {parent}: {error.strerror or error}",
            field="cache_dir",
            remedy="free space there, or name a writable folder with --cache-dir or PDSPEC_CACHE",
        ) from error
    return folder


def damage(folder: Path, content_hash: str) -> str:
    """Why ``folder`` cannot be used, empty if it can: every file of its manifest has the size and hash noted there."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["content_hash"] != content_hash:
            return "it was made from other content"
        for name, wanted in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != wanted["bytes"] or file_hash(path) != wanted["xxh3"]:
                return f"{name} is damaged"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged: {error}"
    return ""


def _build(parent: Path, folder: Path, content_hash: str, build: Callable[[Path], None]) -> None:
    for left in parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        fresh = work / "fresh"
        fresh.mkdir()
        build(fresh)
        files = {path.name: {"bytes": path.stat().st_size, "xxh3": file_hash(path)} for path in sorted(fresh.iterdir())}
        manifest = {"content_hash": content_hash, "files": files}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if folder.exists():
            folder.rename(work / "old")
        fresh.rename(folder)
    finally:
        shutil.rmtree(work)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a kill
        yield
