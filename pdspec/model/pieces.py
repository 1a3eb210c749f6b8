"""The bytes of single tokens, as the decoder of a ``tokenizer.json`` makes them.

Decoding one id through the tokenizer loses them: half a character becomes U+FFFD, and some decoders drop a leading
space. Log probabilities and grammars are about bytes.
"""

from __future__ import annotations

import json
import re
from functools import cached_property

from tokenizers import Tokenizer as Backend

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # sentencepiece's, for a space


class TokenPieces:
    """Of one tokenizer; nothing is computed before it is asked for. Safe to share between threads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def bytes_of(self, token_id: int) -> bytes:
        """Empty for an id without a text; added tokens (special ones, too) by their name."""
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return piece.encode()
        if self._byte_level:
            if all(sign in _BYTE_OF for sign in piece):
                return bytes(_BYTE_OF[sign] for sign in piece)
            return piece.encode()
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace(_SPACE, " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        """Whether a sign of a piece stands for one byte (GPT-2's way), else pieces are text (sentencepiece's)."""
        decoder = self._backend.decoder
        return decoder is not None and "ByteLevel" in _kinds(json.loads(decoder.__getstate__()))


def _kinds(decoder: dict) -> set[str]:
    return {decoder["type"], *(kind for one in decoder.get("decoders", ()) for kind in _kinds(one))}


def _byte_of() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for the signs from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + index): byte for index, byte in enumerate(others)}}


_BYTE_OF = _byte_of()
