"""The trace page: one HTML file with its data inside, which loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

_PLACE = "/*DATA*/null"


def page(replays: Sequence[Mapping[str, Any]]) -> str:
    """The page that plays these recordings (``record``, each with a ``title``)."""
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    if template.count(_PLACE) != 1:
        raise ValueError("the template has no place for the data")
    data = json.dumps(list(replays), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Inside <script>: neither an end tag, nor a comment, nor a line end that JavaScript reads otherwise than JSON.
    for character in ("<", "\u2028", "\u2029"):
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace(_PLACE, data)
