"""What the C library does with memory that a message has left behind.

gRPC for Python wants each message as ``bytes`` of its own and hands out each as another, so a stream of megabytes a
message allocates and frees all the time. By default glibc gives such blocks back to the system at once, and the next
message pays for a page fault every 4 KiB: more CPU time than its copies and the socket together.
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)
LARGEST = 32 << 20  # bytes of a block that is still kept: a frame stays below
KEPT = 256 << 20  # bytes that may lie free at the end of an arena
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed_memory() -> bool:
    """Let this process use freed blocks of megabytes again instead of returning them. False, said once in the log,
    where the C library cannot be told so. Call it when what is loaded at the start is loaded: that may go back."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        kept = False
    else:
        kept = bool(mallopt(_M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT))
    if not kept:
        log.info("this C library has no mallopt: each large message costs page faults")
    return kept
