"""What benchmarks compare: a drafter with a tree, greedy or sampled."""

from __future__ import annotations

from dataclasses import dataclass

from pdspec.spec.registry import family
from pdspec.study.ways import REMEMBERING


@dataclass(frozen=True)
class Setting:
    """A drafter with a tree."""

    drafter: str
    tree: str = ""
    temperature: float = 0.0
    top_p: float = 1.0

    def __str__(self) -> str:
        sampled = f"T={self.temperature:g} top_p={self.top_p:g}" if self.temperature else ""
        return " ".join(part for part in (self.drafter, self.tree, sampled) if part)


def settings_of(drafter: str, nodes: int) -> list[Setting]:
    """What is tried within a budget of ``nodes`` draft nodes per verification."""
    chains = [Setting(drafter, f"chain({k})") for k in (2, 3, 5, 8, 12, 16) if k <= nodes]
    kinds = family(drafter).DESCRIPTION.trees
    if not kinds:
        return [Setting(drafter)]
    if "dynamic" not in kinds:
        return chains
    if drafter in REMEMBERING:
        return [Setting(drafter, f"dynamic({depth},4,{nodes})") for depth in sorted({min(8, nodes), nodes})] + chains
    shapes = ((2, 3, min(5, nodes)), (3, 4, nodes), (4, 4, nodes))
    return [*chains[:3], *(Setting(drafter, f"dynamic({depth},{k},{n})") for depth, k, n in shapes if k <= n)]
