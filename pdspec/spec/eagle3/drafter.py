"""EAGLE-3 as a drafter: ``FeatureDrafter`` over features fused from three levels of the target."""

from __future__ import annotations

from typing import Any

import xxhash

from pdspec.cache.paged import PagedCache
from pdspec.spec.eagle3.checkpoint import Head
from pdspec.spec.eagle3.config import GROUP
from pdspec.spec.eagle3.head import Eagle3Head
from pdspec.spec.feature_drafter import FeatureDrafter


class Eagle3Drafter(FeatureDrafter):
    """``head`` over the pages of ``cache``. ``options`` are ``FeatureDrafter``'s."""

    def __init__(
        self, head: Head, model: Eagle3Head, cache: PagedCache, *, dtype: str, tree: str = "chain(2)",
        padding: bool = False, **options: Any,
    ) -> None:
        geometry = f"eagle3/1 {head.fingerprint()} {dtype} {'first-token' if padding else 'no'} padding"
        super().__init__(
            "eagle3", model, cache, group=GROUP, target_ids=head.target_ids, capture=head.config.fused_layers,
            fingerprint=xxhash.xxh3_128_hexdigest(geometry.encode()), tree=tree, padding=padding, **options,
        )
