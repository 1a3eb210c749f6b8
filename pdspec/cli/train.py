"""``pdspec train``: draft heads, trained on answers that the target itself wrote."""

from __future__ import annotations


def eagle3() -> None:
    """Train an EAGLE-3 head."""
    raise NotImplementedError
