"""EAGLE-3 as a drafter: ``FeatureDrafter`` over features fused from three levels of the target."""

from __future__ import annotations

import xxhash

from pdspec.cache.paged import PagedCache
from pdspec.spec.eagle3.checkpoint import Head
from pdspec.spec.eagle3.config import GROUP
from pdspec.spec.eagle3.head import Eagle3Head
from pdspec.spec.feature_drafter import FeatureDrafter


class Eagle3Drafter(FeatureDrafter):
    """``head`` over the pages of ``cache``."""

    def __init__(
        self, head: Head, model: Eagle3Head, cache: PagedCache, *, dtype: str, tree: str = "chain(2)",
        max_nodes: int = 64, target_matches: bool = True,
    ) -> None:
        super().__init__(
            "eagle3", model, cache, group=GROUP, target_ids=head.target_ids, capture=head.config.fused_layers,
            fingerprint=xxhash.xxh3_128_hexdigest(f"eagle3/1 {head.fingerprint()} {dtype} no padding".encode()),
            tree=tree, max_nodes=max_nodes, target_matches=target_matches,
        )
