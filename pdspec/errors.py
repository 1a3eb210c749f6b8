"""Typed errors. Each says what is wrong, names the field and the remedy; one interceptor
(``wire/interceptors.py``) maps each class to its gRPC status by the ``status`` name it carries."""

from __future__ import annotations


class PdspecError(Exception):
    """Base of every error that a user may see. ``field`` names the request or config field, ``remedy``
    what to do about it."""

    status = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", remedy: str = "") -> None:
        self.message, self.field, self.remedy = message, field, remedy
        head = f"{field}: {message}" if field else message
        super().__init__(f"{head} ({remedy})" if remedy else head)


class InvalidRequest(PdspecError):
    """The request can never be served as it stands."""

    status = "INVALID_ARGUMENT"


class UnknownName(PdspecError):
    """A model, drafter, tree or setting that this deployment does not have."""

    status = "NOT_FOUND"


class Incompatible(PdspecError):
    """Two sides hold different things: fingerprint, layout, drafter, epoch. Names both and the field."""

    status = "FAILED_PRECONDITION"


class Unauthenticated(PdspecError):
    """The caller showed no token or certificate that this side knows."""

    status = "UNAUTHENTICATED"


class Overloaded(PdspecError):
    """No room now; ``retry_after_ms`` is a hint."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, retry_after_ms: int = 100, field: str = "", remedy: str = "") -> None:
        super().__init__(message, field=field, remedy=remedy)
        self.retry_after_ms = retry_after_ms


class PeerLost(PdspecError):
    """A worker went away, stalled or answered nonsense; another may do."""

    status = "UNAVAILABLE"


class Quarantined(PdspecError):
    """A request under which several workers died, one after the other: it is not tried again."""

    status = "ABORTED"


class TransferDamaged(PdspecError):
    """A handoff whose counts or checksums do not match: its KV must not be used."""

    status = "DATA_LOSS"


class DeadlineExceeded(PdspecError):
    """The request's time is over."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(PdspecError):
    """The client went away."""

    status = "CANCELLED"


class ConfigError(PdspecError):
    """A config file, flag or checkpoint that cannot be used; raised before serving starts."""

    status = "FAILED_PRECONDITION"


class CheckpointError(ConfigError):
    """A model or head file that is corrupt, truncated, of the wrong shape or made for another target."""
