"""In which order requests wait: priorities first, then each tenant's fair share of tokens. Plain Python, no clock.

Start-time fair queueing (Goyal, Vin, Cheng 1996) within a priority: a request's tag is the larger of the queue's
virtual time and the end of its tenant's last one, which is that tag plus its tokens. The least tag goes first: a tenant
who sends much waits behind its own requests and not in front of others'.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, order=True)
class Waiting:
    """One request that waits; smaller goes first."""

    rank: int  # minus the priority
    tag: float  # virtual start
    number: int  # of arrival
    tokens: int = field(compare=False)
    tenant: str = field(compare=False)
    item: Any = field(compare=False, default=None)


class FairQueue:
    """Not for several threads."""

    def __init__(self) -> None:
        self._entries: list[Waiting] = []
        self._ends: dict[str, float] = {}  # by tenant: the virtual end of its last request
        self._now = 0.0  # virtual time: the tag that went last
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries)

    def place(self, *, tokens: int, tenant: str, priority: int = 0) -> Waiting:
        """Where a request would stand; nothing changes."""
        tag = max(self._now, self._ends.get(tenant, 0.0))
        return Waiting(rank=-priority, tag=tag, number=self._number, tokens=tokens, tenant=tenant)

    def ahead(self, entry: Waiting) -> Sequence[Waiting]:
        """Those that go before ``entry``."""
        return [one for one in self._entries if one < entry]

    def push(self, item: Any, *, tokens: int, tenant: str, priority: int = 0) -> Waiting:
        """Wait. Returns the entry, for ``remove``."""
        place = self.place(tokens=tokens, tenant=tenant, priority=priority)
        entry = Waiting(rank=place.rank, tag=place.tag, number=place.number, tokens=tokens, tenant=tenant, item=item)
        self._number += 1
        self._ends[tenant] = entry.tag + tokens
        insort(self._entries, entry)
        return entry

    def first(self) -> Waiting | None:
        """Who goes next."""
        return self._entries[0] if self._entries else None

    def pop(self) -> Waiting:
        """Let the first one go. Raises IndexError when nobody waits."""
        entry = self._entries.pop(0)
        self._now = max(self._now, entry.tag)
        self._forget()
        return entry

    def remove(self, entry: Waiting) -> None:
        """It waits no longer: its client left, or its time is over. Safe to repeat."""
        if entry in self._entries:
            self._entries.remove(entry)
            self._forget()

    def _forget(self) -> None:
        """Tenants whose share is no larger than that of one who never came."""
        if not self._entries or len(self._ends) > 4 * len(self._entries) + 64:
            self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}
