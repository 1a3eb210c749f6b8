"""Reference-counted page bookkeeping: which pages are free, which are held and by how many owners.

One page id stands for ``page_size`` token rows in *every* cache group. Only the engine thread calls this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from pdspec.errors import Overloaded


class PoolExhausted(Overloaded):
    """Fewer free pages than asked for; nothing was allocated."""


class IntegrityError(AssertionError):
    """The pool's books do not balance: a bug in whoever releases pages."""


def pages_for(rows: int, page_size: int) -> int:
    """Pages that hold ``rows`` token rows."""
    return -(-rows // page_size)


class PagePool:
    """``num_pages`` pages of ``page_size`` rows, each free or held by one or more owners.

    One owner is special, the prefix cache: a page that it alone keeps is *idle* and counts as free, since ``reclaim``,
    which the cache sets, gives back as many idle pages as it is asked for.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool needs pages and rows, not num_pages={num_pages}, page_size={page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is used first, warm
        self._owners = [0] * num_pages
        self._kept = [False] * num_pages
        self._idle = 0
        self.reclaim: Callable[[int], None] | None = None

    @property
    def free(self) -> int:
        """Pages that can be had: nobody holds them, or the cache alone."""
        return len(self._free) + self._idle

    @property
    def held(self) -> int:
        """Pages with at least one owner beside the cache."""
        return self.num_pages - self.free

    @property
    def idle(self) -> int:
        """Pages that the cache alone keeps."""
        return self._idle

    def owners(self, page: int) -> int:
        """How many owners hold ``page``."""
        return self._owners[page]

    def allocate(self, count: int) -> list[int]:
        """``count`` free pages, each now with one owner. Raises PoolExhausted, and then takes none."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} pages")
        if count > self.free:
            raise PoolExhausted(
                f"{count} KV pages wanted, {self.free} of {self.num_pages} free",
                remedy="retry later, ask for fewer tokens, or raise cache_tokens",
            )
        if count > len(self._free) and self.reclaim is not None:
            self.reclaim(count - len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """One more owner for each held page. Raises IntegrityError for a free one."""
        for page in pages:
            self._check_held(page, "retained")
            self._idle -= self._kept[page] and self._owners[page] == 1
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner less for each page; without owners it is free. Raises IntegrityError for a free one."""
        for page in pages:
            self._check_held(page, "released")
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
            self._idle += self._kept[page] and self._owners[page] == 1

    def keep(self, page: int) -> None:
        """The cache becomes one more owner of a held page. Raises IntegrityError for a free page or one it has."""
        if self._kept[page]:
            raise IntegrityError(f"page {page} is kept twice")
        self.retain([page])
        self._kept[page] = True

    def drop(self, page: int) -> None:
        """The cache gives up a page. Raises IntegrityError for one it does not have."""
        if not self._kept[page]:
            raise IntegrityError(f"page {page} is dropped but was not kept")
        self._idle -= self._owners[page] == 1
        self._kept[page] = False
        self.release([page])

    def check_integrity(self, claims: Iterable[Sequence[int]] | None = None) -> None:
        """Raises IntegrityError unless free + held = total and no page is both or twice free.

        ``claims``, one page list per owner but the cache, says who holds what: each page must then have exactly as many
        owners as claims, which also finds a page given back by one owner on behalf of another.
        """
        if negative := [page for page, owners in enumerate(self._owners) if owners < 0]:
            raise IntegrityError(f"pages with a negative owner count: {negative}")
        if twice := [page for page, times in Counter(self._free).items() if times > 1]:
            raise IntegrityError(f"pages twice in the free list: {twice}")
        if owned := [page for page in self._free if self._owners[page] > 0]:
            raise IntegrityError(f"pages both free and held: {owned}")
        owned = [page for page, owners in enumerate(self._owners) if owners]
        if len(self._free) + len(owned) != self.num_pages:
            raise IntegrityError(f"{len(self._free)} free + {len(owned)} held pages are not {self.num_pages}")
        kept = [page for page, by_cache in enumerate(self._kept) if by_cache]
        if self._idle != sum(self._owners[page] == 1 for page in kept):
            raise IntegrityError(f"{self._idle} idle pages of {len(kept)} that the cache keeps")
        if claims is None:
            return
        claimed = Counter(page for pages in (*claims, kept) for page in pages)
        wrong = {p: (claimed[p], n) for p, n in enumerate(self._owners) if claimed[p] != n}
        if wrong:
            raise IntegrityError(f"pages whose claims and owner counts differ, page: (claims, owners): {wrong}")

    def _check_held(self, page: int, verb: str) -> None:
        if not 0 <= page < self.num_pages or self._owners[page] < 1:
            raise IntegrityError(f"page {page} is {verb} but nobody holds it")
