"""Every command that README and docs show: in fenced blocks without a language or of a shell, and in code spans."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
_PROGRAM = re.compile(r"(?:\S*/)?(pdspec|python|pip|ray|make|curl|openssl)")
_DRAWING = re.compile(r"[─═▶◀→]|\s{3,}\S+/\s")  # of a diagram, or of the tree of folders


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A command as a page has it. ``whole``: in a block, to be typed as it stands; else a mention in a sentence."""

    page: str
    text: str
    whole: bool

    @property
    def words(self) -> list[str]:
        """As a shell splits them, comments left out."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [body for kind, body in _FENCE.findall(page.read_text()) if kind == language]


def shown_commands() -> Iterator[Shown]:
    """In the order of the pages, each once per page."""
    for page in PAGES:
        text = page.read_text()
        blocks = [body for kind, body in _FENCE.findall(text) if kind in ("", "bash", "sh")]
        lines = [(line.strip(), True) for body in blocks for line in body.splitlines()]
        spans = [(span, False) for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))]
        for found, whole in dict.fromkeys(lines + spans):
            program = _PROGRAM.fullmatch(found.partition(" ")[0])
            if program and " " in found and not _DRAWING.search(found.partition("  #")[0]):
                yield Shown(page=page.name, text=" ".join(found.split("\n")), whole=whole)
