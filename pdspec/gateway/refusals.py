"""Errors as OpenAI's API shows them: an HTTP status and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from typing import Any

from pdspec import errors
from pdspec.errors import Overloaded, PdspecError

_BY_CLASS: tuple[tuple[type[PdspecError], int, str, str | None], ...] = (  # class, status, type, code
    (errors.InvalidRequest, 400, "invalid_request_error", None),
    (errors.UnknownName, 404, "invalid_request_error", "not_found"),
    (errors.Unauthenticated, 401, "authentication_error", "invalid_api_key"),
    (errors.Overloaded, 429, "rate_limit_error", "overloaded"),
    (errors.PeerLost, 503, "server_error", "unavailable"),
    (errors.DeadlineExceeded, 504, "server_error", "timeout"),
)
_NAMES = {
    "stop_strings": "stop", "stop_ids": "stop_token_ids", "allowed_ids": "allowed_token_ids", "chat": "messages",
    "text": "prompt", "prompt_ids": "prompt", "json_schema": "response_format", "authorization": None,
}  # fmt: skip


def status_of(error: PdspecError) -> int:
    """The HTTP status."""
    return _kind(error)[0]


def body_of(error: PdspecError) -> dict[str, Any]:
    """The JSON object."""
    _, kind, code = _kind(error)
    name = error.field.removeprefix("sampling.")
    if isinstance(error, errors.UnknownName) and name == "model":
        code = "model_not_found"
    return shape(str(error), kind, param=_NAMES.get(name, name) or None, code=code)


def shape(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def headers_of(error: PdspecError) -> dict[str, str]:
    """When to try again: whole seconds for everybody, milliseconds for OpenAI's clients."""
    if isinstance(error, Overloaded):
        after_ms = max(1, error.retry_after_ms)
        return {"Retry-After": str(math.ceil(after_ms / 1000)), "retry-after-ms": str(after_ms)}
    if isinstance(error, errors.Unauthenticated):
        return {"WWW-Authenticate": "Bearer"}
    return {}


def _kind(error: PdspecError) -> tuple[int, str, str | None]:
    for kind, status, name, code in _BY_CLASS:
        if isinstance(error, kind):
            return status, name, code
    return 500, "server_error", error.status.lower()
