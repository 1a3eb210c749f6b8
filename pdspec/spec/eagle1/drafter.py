"""EAGLE-1 as a drafter: ``FeatureDrafter`` over the target's final hidden states."""

from __future__ import annotations

from typing import Any

import xxhash

from pdspec.cache.paged import PagedCache
from pdspec.spec.eagle1.checkpoint import Head
from pdspec.spec.eagle1.head import Eagle1Head
from pdspec.spec.feature_drafter import FeatureDrafter


class Eagle1Drafter(FeatureDrafter):
    """``head`` over the pages of ``cache``; ``name`` is eagle1 or eagle2. ``options`` are ``FeatureDrafter``'s."""

    def __init__(
        self, name: str, head: Head, model: Eagle1Head, cache: PagedCache, *, group: str, dtype: str, tree: str,
        padding: bool = False, **options: Any,
    ) -> None:
        geometry = f"{name}/1 {head.fingerprint()} {dtype} {'first-token' if padding else 'no'} padding"
        super().__init__(
            name, model, cache, group=group, target_ids=head.target_ids, want_final=True, padding=padding,
            fingerprint=xxhash.xxh3_128_hexdigest(geometry.encode()), tree=tree, **options,
        )
