"""Damage on purpose: what a bad link or a bad peer would do to frames, for chaos tests (``WorkerConfig.frame_faults``).

Each is applied to data frames alone, so that each must be found before anything that came is used.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Mapping

import numpy as np

from pdspec.errors import ConfigError
from pdspec.transfer.frames import DATA_FRAMES
from pdspec.transfer.schema import Frame

log = logging.getLogger(__name__)
KINDS = ("flip", "truncate", "drop", "repeat", "swap", "epoch")


class FrameFaults:
    """``chances`` per data frame by kind; ``counts`` of what was done. Raises ConfigError for an unknown kind."""

    def __init__(self, chances: Mapping[str, float], *, seed: int | None = None) -> None:
        for kind, chance in chances.items():
            if kind not in KINDS or not 0 <= chance <= 1:
                remedy = f"give chances from 0 to 1 of {', '.join(KINDS)}"
                raise ConfigError(f"{kind}={chance}", field="frame_faults", remedy=remedy)
        self.counts: Counter[str] = Counter()
        self._chances, self._random = dict(chances), random.Random(seed)
        self._held: dict[int, bytes] = {}  # by epoch: frames that wait to be sent behind the next one

    def apply(self, frame: Frame, data: bytes, memory: np.ndarray | None = None) -> list[bytes]:
        """What goes out instead of ``data``, the encoded ``frame``. ``memory`` is its payload where that lies in shared
        memory: a bit there flips as well as one of the frame, and what is cut off is as if it had not been written."""
        epoch = getattr(frame, "epoch", 0)
        held = self._held.pop(epoch, None)
        if not isinstance(frame, DATA_FRAMES):
            return [data] if held is None else [held, data]  # order among data is what counts: no swap after all
        if held is not None:
            self._note("swap", frame, epoch)
            return [data, held]
        kind = self._draw()
        if kind == "swap":
            self._held[epoch] = data
            return []
        if kind:
            self._note(kind, frame, epoch)
        match kind:
            case "flip":
                at = self._random.randrange(8 * (len(data) + (0 if memory is None else len(memory))))
                if memory is not None and at >= 8 * len(data):
                    memory[at // 8 - len(data)] ^= np.uint8(1 << at % 8)
                    return [data]
                damaged = bytearray(data)
                damaged[at // 8] ^= 1 << at % 8
                return [bytes(damaged)]
            case "truncate":
                if memory is not None and self._random.random() < 0.5:
                    memory[self._random.randrange(len(memory)) :] ^= np.uint8(255)
                    return [data]
                return [data[: self._random.randrange(len(data))]]
            case "drop":
                return []
            case "repeat":
                return [data, data]
            case "epoch":
                return [dataclasses.replace(frame, epoch=epoch ^ 1).to_bytes()]
        return [data]

    def forget(self, epoch: int) -> None:
        """The stream has ended."""
        self._held.pop(epoch, None)

    def _draw(self) -> str:
        point = self._random.random()
        for kind, chance in self._chances.items():
            point -= chance
            if point < 0:
                return kind
        return ""

    def _note(self, kind: str, frame: Frame, epoch: int) -> None:
        self.counts[kind] += 1
        log.warning("injected %s into a %s frame of epoch=%d", kind, frame.kind, epoch)
