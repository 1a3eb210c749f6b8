"""Between ``pdspec.errors`` and gRPC status: the code says the kind, the details say field and remedy, and one
trailing metadata entry carries the error whole, so that a typed error crosses any number of hops unchanged."""

from __future__ import annotations

import grpc
import msgpack

from pdspec import errors
from pdspec.errors import Overloaded, PdspecError

ERROR_KEY = "pdspec-error-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
_MAX_TEXT = 2000  # characters; HTTP/2 headers are limited to 8 KiB
_CLASSES: dict[str, type[PdspecError]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, PdspecError)
}
_BY_CODE: dict[grpc.StatusCode, type[PdspecError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.UnknownName,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Incompatible,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.PeerLost,
    grpc.StatusCode.ABORTED: errors.Quarantined,
    grpc.StatusCode.DATA_LOSS: errors.TransferDamaged,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
}
_BROKEN = (  # how gRPC itself reports a peer that died, was stopped or closed the connection
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)
_SIZE_TEXT = "message larger than max"  # gRPC's own refusal, made before our code sees the message


def code_of(error: PdspecError) -> grpc.StatusCode:
    """The gRPC status code of ``error``."""
    return grpc.StatusCode[error.status]


def details_of(error: PdspecError) -> str:
    """The status text: field, message and remedy."""
    return str(error)[:_MAX_TEXT]


def trailing_metadata(error: PdspecError) -> tuple[tuple[str, str | bytes], ...]:
    """The whole error for our own clients, and the retry hint that any gRPC client understands."""
    blob = msgpack.packb(error_to_dict(error))
    entries: tuple[tuple[str, str | bytes], ...] = ((ERROR_KEY, blob),)
    if isinstance(error, Overloaded):
        entries += ((PUSHBACK_KEY, str(error.retry_after_ms)),)
    return entries


def error_to_dict(error: PdspecError) -> dict[str, str | int]:
    """A flat map with the error's class name (of ``pdspec.errors``: the nearest, for a class from elsewhere) and texts;
    texts are cut to what a header holds."""
    values: dict[str, str | int] = {
        "class": next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _CLASSES),
        "message": error.message[:_MAX_TEXT],
        "field": error.field[:200],
        "remedy": error.remedy[:_MAX_TEXT // 2],
    }  # fmt: skip
    if isinstance(error, Overloaded):
        values["retry_after_ms"] = error.retry_after_ms
    return values


def error_from_dict(values: dict) -> PdspecError:
    """The reverse of ``error_to_dict``; an unknown class becomes PdspecError. Raises ValueError for other shapes."""
    texts = {name: values.get(name, "") for name in ("message", "field", "remedy")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"not an error: {values!r}")
    kind = _CLASSES.get(str(values.get("class")), PdspecError)
    extra = {}
    if issubclass(kind, Overloaded) and isinstance(values.get("retry_after_ms"), int):
        extra["retry_after_ms"] = values["retry_after_ms"]
    return kind(texts["message"], field=texts["field"], remedy=texts["remedy"], **extra)


def from_rpc_error(error: grpc.RpcError, *, peer: str = "") -> PdspecError:
    """What a client raises for a failed call: the typed error the server sent, or the nearest class to its code.

    ``peer`` is named when the text is gRPC's own (a lost connection says little otherwise).
    """
    for key, value in _metadata(error):
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                return error_from_dict(msgpack.unpackb(value))
            except (ValueError, AttributeError, msgpack.UnpackException):
                break  # not ours after all: the code still says the kind
    code = error.code() if hasattr(error, "code") else None
    details = (error.details() if hasattr(error, "details") else None) or str(code)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _SIZE_TEXT in details:
        remedy = "send less, or raise max_message_bytes on both sides"
        return errors.InvalidRequest(details, field="message", remedy=remedy)
    name = code.name if code else "UNKNOWN"
    text = f"{peer}: {name}: {details}" if peer else details
    kind = _BY_CODE.get(code, PdspecError) if code else PdspecError
    return kind(text)


def is_broken(error: grpc.RpcError) -> bool:
    """Whether the connection or the peer went away, as opposed to an answer that the peer gave."""
    return error.code() in _BROKEN and all(key != ERROR_KEY for key, _ in _metadata(error))


def from_peer_error(error: grpc.RpcError, *, peer: str) -> PdspecError:
    """``from_rpc_error`` for a call that this side did not cancel: whatever breaks the transport is PeerLost."""
    if is_broken(error):
        return errors.PeerLost(f"{peer} was lost: {error.code().name} {error.details()}")
    return from_rpc_error(error, peer=peer)


def _metadata(error: grpc.RpcError) -> tuple:
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return tuple(trailing) if trailing else ()
