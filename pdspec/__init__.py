"""Serving of language models with prefill and decode on different workers and speculative decoding.

``pdspec.Client`` and ``pdspec.AsyncClient`` ask a running deployment; they are imported when they are first named, and
``import pdspec`` alone imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdspec.api import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pdspec import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
