"""A piece of shared memory that two workers on one host exchange payloads through.

    head (one page): magic, nonce, geometry │ slot 0 │ slot 1 │ …

The decode worker creates it under a random name and locks it; the prefill worker opens that name and finds the nonce
at its head, which proves that both see the same host and the same ``/dev/shm``. As soon as both have it mapped the name
goes away, so that nothing is left of it however they end. The lock says whether the creator still lives, across
containers too: the kernel drops it with the process.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import secrets
import stat
import struct
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from pdspec.errors import TransferDamaged

log = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
SLOTS, SLOT_BYTES = 16, 2 << 20
_PREFIX = "pdspec-"
_NAME = re.compile(r"pdspec-[0-9a-f]{32}")
_HEAD, _MAGIC, _DATA_AT = struct.Struct("<8s16sII"), b"pdspecS1", 4096
_STALE_S = 10.0  # a creator locks its segment long before


class Segment:
    """Made by ``create`` or ``attach``; both map all of it before they return: no step pays for a page fault."""

    def __init__(
        self, path: Path, fd: int, *, nonce: bytes, slots: int, slot_bytes: int, created: bool = False
    ) -> None:
        self.path, self.nonce, self.slots, self.slot_bytes = path, nonce, slots, slot_bytes
        self.shared = False  # whether the other side has it mapped, on the creator's side
        self._fd, self._closing = fd, weakref.finalize(self, _give_up, fd, path if created else None)
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        self._memory = np.frombuffer(mmap.mmap(fd, _DATA_AT + slots * slot_bytes, flags=flags), np.uint8)

    @classmethod
    def create(cls, folder: Path = FOLDER, *, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> Segment:
        """A new segment with all its memory. Raises OSError where there is no room or no such folder."""
        path, nonce = folder / f"{_PREFIX}{secrets.token_hex(16)}", secrets.token_bytes(16)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.posix_fallocate(fd, 0, _DATA_AT + slots * slot_bytes)
            os.pwrite(fd, _HEAD.pack(_MAGIC, nonce, slots, slot_bytes), 0)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return cls(path, fd, nonce=nonce, slots=slots, slot_bytes=slot_bytes, created=True)

    @classmethod
    def attach(cls, offer: str, folder: Path = FOLDER) -> Segment:
        """The segment that ``offer`` (see ``offer``) names. Raises OSError where it is not there, ValueError where it
        is another one or none."""
        name, _, nonce = offer.partition(":")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:40]!r} is no segment's name")
        fd = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status, head = os.fstat(fd), os.pread(fd, _HEAD.size, 0)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or len(head) != _HEAD.size:
                raise ValueError(f"{name} is not a segment of this user")
            magic, found, slots, slot_bytes = _HEAD.unpack(head)
            if magic != _MAGIC or found.hex() != nonce:
                raise ValueError(f"{name} is another segment")
            if not slots or not slot_bytes or status.st_size != _DATA_AT + slots * slot_bytes:
                raise ValueError(f"{name} is cut short")
        except BaseException:
            os.close(fd)
            raise
        return cls(folder / name, fd, nonce=found, slots=slots, slot_bytes=slot_bytes)

    @property
    def offer(self) -> str:
        """``NAME:NONCE``: what the other side needs."""
        return f"{self.path.name}:{self.nonce.hex()}"

    def slot(self, index: int) -> np.ndarray:
        """uint8 ``[slot_bytes]``, a view."""
        start = _DATA_AT + index * self.slot_bytes
        return self._memory[start : start + self.slot_bytes]

    def place(self, index: int, length: int) -> list[int]:
        """``[offset, length]`` of the first bytes of a slot, as a frame's header names them."""
        return [index * self.slot_bytes, length]

    def view(self, place: Any) -> memoryview:
        """The payload at a ``place`` that came from the other side. Raises TransferDamaged for one that is none."""
        match place:
            case [int(offset), int(length)] if type(offset) is int and type(length) is int:
                index, rest = divmod(offset, self.slot_bytes)
                if rest == 0 and 0 <= index < self.slots and 0 < length <= self.slot_bytes:
                    return self.slot(index)[:length].data.toreadonly()
        raise TransferDamaged(f"{str(place)[:60]} is no place in the segment", field="frame.shm")

    def unlink(self) -> None:
        """Take the name away; what is mapped stays. Safe to repeat."""
        self.path.unlink(missing_ok=True)

    def creator_lives(self) -> bool:
        """Whether the process that created it still holds it. Asked on the attached side."""
        return _locked(self._fd)

    def close(self) -> None:
        """Give it up, as its end does; the memory goes with the last view of it. Safe to repeat."""
        self._closing()


def sweep(folder: Path = FOLDER) -> int:
    """Remove segments whose creators died before they could take the names away. Returns how many."""
    removed = 0
    for path in folder.glob(f"{_PREFIX}*") if folder.is_dir() else ():
        if not _NAME.fullmatch(path.name):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            if time.time() - os.fstat(fd).st_mtime > _STALE_S and not _locked(fd):
                path.unlink(missing_ok=True)
                removed += 1
        finally:
            os.close(fd)
    if removed:
        log.warning("%d segments of shared memory were left by workers that died; removed", removed)
    return removed


def _give_up(fd: int, path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)
    fcntl.flock(fd, fcntl.LOCK_UN)  # the mapping has the same open file: closing this end of it would not unlock
    os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
