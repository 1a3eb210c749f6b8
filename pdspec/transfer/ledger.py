"""What a handoff has moved, counted alike on both ends and compared at Done."""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass, field

import xxhash

from pdspec.errors import TransferDamaged
from pdspec.transfer.frames import Done, DraftStart, HiddenRows, Pages
from pdspec.transfer.wireformat import Payload, byte_views

HIDDEN, START = "hidden", "draft_start"  # ledger names of what is not a cache group
MAX_DROPPED = 4096  # frames of other epochs that one stream may bring
_WHERE = struct.Struct("<5q")


@dataclass
class _Count:
    bytes: int = 0
    rows: int = 0
    hash: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)


class Ledger:
    """Bytes, rows and an xxh3_64 (places and payloads) per group of the frames of one epoch, in their order.

    The sender calls ``add`` for each frame before it sends it and makes Done with ``done``. The receiver calls
    ``admit`` for every frame that comes, ``expect`` for the data, ``count`` once it has been taken out of the frame,
    and at Done ``check`` (or ``damaged``, where draft state may be rebuilt). Hashed after it was copied, a payload that
    changed meanwhile (in shared memory it can) is found. Rows are those of each frame added up, so L layers of n rows
    count L·n.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.dropped = 0  # frames of another epoch
        self._next_seq = 0
        self._counts: dict[str, _Count] = defaultdict(_Count)
        self._covered: dict[tuple[str, int, int, int], tuple[int, int]] = {}

    def next_seq(self) -> int:
        """The ``seq`` that the next data frame must carry."""
        return self._next_seq

    def admit(self, epoch: int) -> bool:
        """False for a frame of another epoch: drop it (it is counted). Raises TransferDamaged when they do not end."""
        if epoch == self.epoch:
            return True
        self.dropped += 1
        if self.dropped > MAX_DROPPED:
            raise TransferDamaged(f"{self.dropped} frames of other epochs", field="frame.epoch")
        return False

    def add(self, frame: Pages | HiddenRows | DraftStart) -> None:
        """``expect`` and ``count``."""
        self.expect(frame)
        self.count(frame)

    def expect(self, frame: Pages | HiddenRows | DraftStart) -> None:
        """Raises TransferDamaged for a ``seq`` that does not follow, another epoch, or rows that do not continue those
        of their layer."""
        if frame.epoch != self.epoch:
            message = f"epoch {frame.epoch} in the ledger of epoch {self.epoch}"
            raise TransferDamaged(message, field=f"{frame.kind}.epoch")
        if frame.seq != self._next_seq:
            raise TransferDamaged(f"seq {frame.seq} where {self._next_seq} was due", field=f"{frame.kind}.seq")
        self._next_seq += 1
        if isinstance(frame, Pages):
            self._continue(frame)

    def count(self, frame: Pages | HiddenRows | DraftStart) -> None:
        """Add an expected frame's bytes, rows and hash. Hashing releases the GIL for large payloads."""
        match frame:
            case Pages():
                place = (frame.layer, frame.start, frame.count, frame.head_start, frame.head_count)
                self._count(frame.group, place, frame.count, frame.payload)
            case HiddenRows():
                self._count(HIDDEN, (0, frame.start, frame.count, 0, 0), frame.count, frame.payload)
            case DraftStart():
                header, payload = frame.pack()
                arrays = b"".join(header[name] for name in ("token_ids", "log_q", "score"))
                self._count(START, (0, 0, len(frame.token_ids), 0, 0), 1, arrays + payload)

    def moved(self, group: str) -> int:
        """Payload bytes of ``group`` so far."""
        return self._counts[group].bytes if group in self._counts else 0

    def done(self, stats: dict[str, float] | None = None) -> Done:
        """The frame that closes the stream."""
        counts = self._counts.items()
        return Done(
            epoch=self.epoch,
            bytes={name: count.bytes for name, count in counts},
            rows={name: count.rows for name, count in counts},
            xxh3={name: count.hash.intdigest() for name, count in counts},
            stats=stats or {},
        )

    def damaged(self, done: Done) -> dict[str, str]:
        """Group → what differs, empty when both ends agree on everything."""
        mine = self.done()
        found: dict[str, str] = {}
        for what in ("bytes", "rows", "xxh3"):
            sent, got = getattr(done, what), getattr(mine, what)
            for group in sorted(sent.keys() | got.keys()):
                if sent.get(group) != got.get(group):
                    found.setdefault(group, f"{what}: sent {sent.get(group)}, received {got.get(group)}")
        return found

    def check(self, done: Done) -> None:
        """Raises TransferDamaged naming the first group and field that differ."""
        for group, difference in self.damaged(done).items():
            raise TransferDamaged(difference, field=f"done.{group}", remedy="the KV is not used; prefill again")

    def check_covered(self, group: str, *, layers: int, heads: int, start: int, stop: int) -> None:
        """Raises TransferDamaged unless rows start..stop-1 of all heads of all layers came exactly once."""
        if start == stop:
            return
        held: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for (name, layer, head, count), rows in self._covered.items():
            if name == group and rows == (start, stop):
                held[layer].append((head, count))
        for layer in range(layers):
            next_head = 0
            for head, count in sorted(held.get(layer, ())):
                next_head = next_head + count if head == next_head else -1
            if next_head != heads:
                message = f"layer {layer} lacks rows {start}..{stop - 1} of all {heads} heads"
                raise TransferDamaged(message, field=f"pages.{group}", remedy="the KV is not used; prefill again")

    def _continue(self, frame: Pages) -> None:
        key = (frame.group, frame.layer, frame.head_start, frame.head_count)
        first, stop = self._covered.get(key, (frame.start, frame.start))
        if frame.start != stop:
            message = f"layer {frame.layer} continues at row {frame.start}, {stop} was due"
            raise TransferDamaged(message, field=f"pages.{frame.group}")
        self._covered[key] = (first, frame.start + frame.count)

    def _count(self, group: str, place: tuple[int, ...], rows: int, payload: Payload) -> None:
        count = self._counts[group]
        count.rows += rows
        count.hash.update(_WHERE.pack(*place))
        for part in byte_views(payload):
            count.bytes += part.nbytes
            count.hash.update(part)
