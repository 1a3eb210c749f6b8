"""The closed form of speculative decoding with a chain of K drafts (Leviathan et al. 2211.17192, section 3).

E = (1 − α^{K+1}) / (1 − α)      T_step = K · T_draft + T_target      speed-up = T_target · E / T_step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdspec.errors import InvalidRequest

CHAIN = 16  # drafts of the longest chain that is tried


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Times in seconds. ``expected_tokens`` is E, of one step."""

    drafts: int
    expected_tokens: float
    step_s: float
    target_s: float

    @property
    def token_s(self) -> float:
        """Seconds of one output token."""
        return self.step_s / self.expected_tokens

    @property
    def speedup(self) -> float:
        """Over plain decoding, whose token takes ``target_s``."""
        return self.target_s / self.token_s


def expected_tokens(alpha: float, drafts: int) -> float:
    """E: mean tokens of a step of ``drafts`` drafts, each accepted with chance ``alpha`` if those before it were.
    Raises InvalidRequest for an alpha outside 0..1 or a negative K."""
    if not 0.0 <= alpha <= 1.0:
        raise InvalidRequest(f"{alpha} is no chance", field="alpha", remedy="give one from 0 to 1")
    if drafts < 0:
        raise InvalidRequest(f"{drafts} drafts", field="k", remedy="draft 0 or more tokens")
    return float(drafts + 1) if alpha == 1.0 else (1.0 - alpha ** (drafts + 1)) / (1.0 - alpha)


def expected_of(positions: Sequence[float]) -> float:
    """E of a chain whose draft at depth d is accepted with chance ``positions[d]`` if those before it were."""
    total = product = 1.0
    for chance in positions:
        product *= chance
        total += product
    return total


def speculation(alpha: float, drafts: int, draft_s: float, target_s: float) -> Speculation:
    """The closed form at K = ``drafts``: a draft takes ``draft_s``, a target forward ``target_s``."""
    return Speculation(
        drafts=drafts, expected_tokens=expected_tokens(alpha, drafts), step_s=drafts * draft_s + target_s,
        target_s=target_s,
    )  # fmt: skip


def best_drafts(alpha: float, draft_s: float, target_s: float) -> Speculation:
    """The K of the fewest seconds per token; 0 where drafting does not pay."""
    return min((speculation(alpha, k, draft_s, target_s) for k in range(CHAIN + 1)), key=lambda found: found.token_s)
