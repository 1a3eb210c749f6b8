"""Which KV pages hold the beginning of which token sequence: a hash of token pages, without torch.

The key of page i is a hash of everything up to its end: of what the KV depends on (the model's content, a tenant's
salt), of the pages before, and of its own tokens. So equal keys mean equal target rows, and a page's place in a chain
needs no tree: what is evicted and kept again finds its old neighbours.

Draft rows at the end of a page read tokens behind it (``ahead`` of them). They are right for who goes on with these
tokens; whoever goes on otherwise takes the page as the last one, in a copy, and makes these rows anew. So one key may
have several pages: for other draft groups, and for other tokens behind.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from pdspec.cache.pool import PagePool

MAX_VARIANTS = 4  # pages of one key


@dataclass(kw_only=True, eq=False)
class CachedPage:
    """``groups`` are the draft groups whose rows it has, beside the target's; ``ahead`` the tokens behind it that they
    have read. ``hidden`` is what the owner keeps beside the page."""

    key: bytes
    page: int
    groups: frozenset[str]
    ahead: tuple[int, ...]
    hidden: Any = None
    used: int = 0


class PageKeys:
    """Keys of a sequence's pages, made as its tokens become known."""

    def __init__(self, root: bytes, page_size: int) -> None:
        self._root, self._page_size = root, page_size
        self._keys: list[bytes] = []

    def first(self, token_ids: Sequence[int], count: int) -> list[bytes]:
        """Of the first ``count`` pages. The tokens of pages whose key was asked for before may not have changed."""
        while len(self._keys) < count:
            start = len(self._keys) * self._page_size
            page = np.array(token_ids[start : start + self._page_size], "<i4")
            before = self._keys[-1] if self._keys else self._root
            self._keys.append(hashlib.sha256(before + page.tobytes()).digest())
        return self._keys[:count]


class PrefixIndex:
    """An owner of pages of ``pool``; gives up the one used least lately when the pool asks for pages. ``salt`` is what
    all KV here depends on. Engine thread only; the counts may be read anywhere."""

    def __init__(self, pool: PagePool, salt: str) -> None:
        self.pool, self._salt = pool, salt
        self._by_key: dict[bytes, list[CachedPage]] = {}
        self._order: OrderedDict[int, CachedPage] = OrderedDict()  # by page, the one used least lately first
        self._clock = self.evictions = 0
        pool.reclaim = self.evict

    def __len__(self) -> int:
        return len(self._order)

    def keys(self, salt: str = "") -> PageKeys:
        """For one sequence; those of another ``salt`` never meet."""
        root = hashlib.sha256(f"pdspec prefix/1\0{self._salt}\0{salt}".encode()).digest()
        return PageKeys(root, self.pool.page_size)

    def find(self, keys: Sequence[bytes], token_ids: Sequence[int], groups: frozenset[str]) -> list[CachedPage]:
        """The longest chain of pages that have rows of ``groups`` and, all but the last, right ones to their end."""
        found: list[CachedPage] = []
        for key in keys:
            usable = [one for one in self._by_key.get(key, ()) if groups <= one.groups]
            if not usable:
                break
            end = (len(found) + 1) * self.pool.page_size
            right = [one for one in usable if not groups or tuple(token_ids[end : end + len(one.ahead)]) == one.ahead]
            found.append(max(right or usable, key=lambda one: one.hidden is not None))
            if not right:
                break
        self.touch(found)
        return found

    def touch(self, pages: Sequence[CachedPage]) -> None:
        """A chain is in use: a page is given up after those that follow it. Those given up already stay so."""
        for one in reversed(pages):
            if self._order.get(one.page) is one:
                self._order.move_to_end(one.page)
                self._clock += 1
                one.used = self._clock

    def add(
        self, key: bytes, page: int, *, groups: frozenset[str], ahead: tuple[int, ...], hidden: Any = None
    ) -> CachedPage:
        """Keep ``page``, which somebody holds, unless what it has is there. The page that stands for it from now on."""
        variants = self._by_key.get(key, [])
        for one in variants:
            if one.page == page or (groups <= one.groups and (not groups or one.ahead == ahead)):
                one.hidden = hidden if one.hidden is None and groups == one.groups else one.hidden
                return one
        less = [one for one in variants if one.groups < groups]
        more = sorted((one for one in variants if one not in less), key=lambda one: one.used)
        for one in (*less, *more[: max(0, len(more) - MAX_VARIANTS + 1)]):
            self.remove(one)
        new = CachedPage(key=key, page=page, groups=groups, ahead=ahead, hidden=hidden)
        self.pool.keep(page)
        self._by_key.setdefault(key, []).append(new)
        self._order[page] = new
        return new

    def remove(self, one: CachedPage) -> None:
        """Give up a page, whoever else holds it."""
        del self._order[one.page]
        variants = self._by_key[one.key]
        variants.remove(one)
        if not variants:
            del self._by_key[one.key]
        self.pool.drop(one.page)

    def evict(self, count: int) -> None:
        """Give up ``count`` pages that nobody else holds, those used least lately; fewer where there are no more."""
        idle = (one for one in self._order.values() if self.pool.owners(one.page) == 1)
        for one in list(islice(idle, count)):
            self.remove(one)
            self.evictions += 1

    def clear(self) -> None:
        """Give up everything."""
        for one in list(self._order.values()):
            self.remove(one)

    def pages(self) -> Iterable[CachedPage]:
        """All of them, the one used least lately first."""
        return self._order.values()
