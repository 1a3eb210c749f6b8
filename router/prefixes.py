"""Which workers probably hold the KV of a prompt's beginning: a bounded, approximate map from hashes of token blocks to
the workers that such prompts, and their answers, were sent to. Workers evict as they like and nobody tells; a wrong
guess costs a prefill that would have been needed anyway."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from pdspec.cache.prefix import PageKeys

BLOCK, CAPACITY = 16, 1 << 17  # tokens of a block; blocks that are remembered


class PrefixMap:
    """On the router's event loop only."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[bytes, dict[str, None]] = OrderedDict()

    @staticmethod
    def keys(token_ids: Sequence[int], salt: str = "") -> list[bytes]:
        """Of the whole blocks of a sequence."""
        root = hashlib.sha256(salt.encode()).digest()
        return PageKeys(root, BLOCK).first(token_ids, len(token_ids) // BLOCK)

    def note(self, keys: Sequence[bytes], address: str) -> None:
        """``address`` gets, or has, these blocks."""
        for key in keys:
            self._workers.setdefault(key, {})[address] = None
            self._workers.move_to_end(key)
        while len(self._workers) > self._capacity:
            self._workers.popitem(last=False)

    def cached(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Tokens by address, of those that should have some."""
        found: dict[str, int] = {}
        for index, key in enumerate(keys):
            here = [a for a in self._workers.get(key, ()) if found.get(a, 0) == index * BLOCK]
            if not here:
                break
            found.update(dict.fromkeys(here, (index + 1) * BLOCK))
        return found
