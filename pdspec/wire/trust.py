"""Who may speak with whom: TLS on every link, bearer tokens of users, proof of membership between the roles.

    user ── TLS (+ token, + certificate of ``tls.client_ca``) ──▶ router
    router, decode worker, relay ── mutual TLS of ``tls.ca`` (+ cluster token) ──▶ workers, relay

Secrets stand in files that settings name: settings, their dumps and the logs never hold one. Token files are read
again when they change, certificates of servers too (with each handshake); a channel keeps the certificate it began
with until its process starts anew.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc

from pdspec.config import TlsConfig
from pdspec.errors import ConfigError, Unauthenticated

log = logging.getLogger(__name__)
AUTHORIZATION = "authorization"
MIN_TOKEN_CHARACTERS = 16
RELOAD_S = 0.5  # a changed token file counts after so long at the latest
_OPEN_TO_ALL = ("/grpc.health.v1.Health/",)  # probes have no token, and learn nothing but up or down
Metadata = tuple[tuple[str, str], ...]


class TokenFile:
    """Tokens, one a line (``#`` begins a comment), read again when the file changes. An unreadable or empty file is a
    ConfigError at first; later the tokens known stay in force, and the log says so."""

    def __init__(self, path: str, *, field: str) -> None:
        self.path, self._field = Path(path), field
        self._tokens = self._read()
        self._stamp = self._stat()
        self._looked_at = time.monotonic()

    def first(self) -> str:
        """The token to show to others."""
        self._refresh()
        return self._tokens[0]

    def holds(self, token: str) -> bool:
        """Compared with every token of the file, in a time that depends on neither."""
        self._refresh()
        given, found = _digest(token), False
        for known in self._tokens:
            found |= hmac.compare_digest(given, _digest(known))
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._tokens = self._read()
            log.info("%s was read again: %d tokens", self.path, len(self._tokens))
        except ConfigError as error:
            log.error("the earlier tokens stay in force: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self.path)
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)

    def _read(self) -> tuple[str, ...]:
        text = _read_file(self.path, self._field).decode("utf-8", errors="replace")
        lines = [line.partition("#")[0].strip() for line in text.splitlines()]
        tokens = tuple(line for line in lines if line)
        remedy = f"write one token a line, of {MIN_TOKEN_CHARACTERS} characters or more: openssl rand -hex 32"
        if not tokens:
            raise ConfigError(f"{self.path} holds no token", field=self._field, remedy=remedy)
        if any(len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or " " in token for token in tokens):
            raise ConfigError(f"{self.path} holds a token that is short or no ASCII", field=self._field, remedy=remedy)
        return tokens


class Secured(Protocol):
    """The settings that ``Trust.of`` reads."""

    @property
    def tls(self) -> TlsConfig:
        """Certificates."""

    @property
    def cluster_token_file(self) -> str:
        """Path."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What one process shows to others and asks of them. Without certificates links are in plain text; without token
    files nobody is asked for a token."""

    tls: TlsConfig = field(default_factory=TlsConfig)
    cluster: TokenFile | None = None
    users: TokenFile | None = None

    @staticmethod
    def of(config: Secured) -> Trust:
        """Read the files that ``config`` names. Raises ConfigError naming the setting."""
        users = getattr(config, "token_file", "")
        trust = Trust(
            tls=config.tls,
            cluster=TokenFile(config.cluster_token_file, field="cluster_token_file")
            if config.cluster_token_file
            else None,
            users=TokenFile(users, field="token_file") if users else None,
        )
        trust.channel_credentials()  # files that cannot be read are refused now
        host = getattr(config, "host", "")
        if (trust.cluster or trust.users) and not trust.tls.cert and host not in ("127.0.0.1", "localhost", "::1"):
            log.warning("tokens travel in plain text on %s: give tls.cert, tls.key and tls.ca", host or "the network")
        return trust

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """For channels to members and to the router; None: plain text."""
        tls = self.tls
        if not tls.cert and not tls.ca:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=_read_file(tls.ca, "tls.ca") if tls.ca else None,
            private_key=_read_file(tls.key, "tls.key") if tls.cert else None,
            certificate_chain=_read_file(tls.cert, "tls.cert") if tls.cert else None,
        )

    def channel_options(self) -> tuple[tuple[str, str], ...]:
        """The name that certificates are checked for, where it is not the address."""
        return (("grpc.ssl_target_name_override", self.tls.name),) if self.tls.name else ()

    def server_credentials(self, *, members: bool) -> grpc.ServerCredentials | None:
        """For a port; None: plain text. ``members``: only peers with a certificate of ``tls.ca`` get through the
        handshake; otherwise those of ``tls.client_ca``, where it is set."""
        tls = self.tls
        if not tls.cert:
            return None
        roots = [tls.ca] if members else [tls.client_ca, tls.ca] if tls.client_ca else []
        files = _Certificates(cert=tls.cert, key=tls.key, roots=tuple(roots))
        return grpc.dynamic_ssl_server_credentials(files.read(), files.changed, bool(roots))

    def metadata(self) -> Metadata:
        """Of every call to a member."""
        return bearer(self.cluster.first()) if self.cluster else ()

    def check(self, method: str, metadata: Metadata, *, members: bool) -> None:
        """Raises Unauthenticated unless a call with ``metadata`` may go on."""
        if method.startswith(_OPEN_TO_ALL):
            return
        asked = [file for file in ((self.cluster,) if members else (self.users, self.cluster)) if file]
        if not asked or (not members and self.users is None):
            return
        token = _token(metadata)
        if not token:
            raise Unauthenticated("no token was sent", field=AUTHORIZATION, remedy=_remedy(members))
        if not any([file.holds(token) for file in asked]):  # a list: every file is compared
            raise Unauthenticated("the token is not known here", field=AUTHORIZATION, remedy=_remedy(members))


OPEN = Trust()


def bearer(token: str) -> Metadata:
    """Call metadata that carries ``token``; empty for none."""
    return ((AUTHORIZATION, f"Bearer {token}"),) if token else ()


@dataclass(kw_only=True)
class _Certificates:
    """Files of a server's certificates; ``changed`` is asked with every handshake, from gRPC's own thread."""

    cert: str
    key: str
    roots: tuple[str, ...]
    _stamp: tuple[int, ...] = ()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises ConfigError."""
        self._stamp = self._stat()
        pair = (_read_file(self.key, "tls.key"), _read_file(self.cert, "tls.cert"))
        roots = b"\n".join(_read_file(path, "tls.ca") for path in self.roots) or None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificates, None while they are what they were or cannot be read."""
        if self._stat() == self._stamp:
            return None
        try:
            return self.read()
        except ConfigError as error:
            log.error("the earlier certificate stays in use: %s", error)
            return None

    def _stat(self) -> tuple[int, ...]:
        try:
            return tuple(os.stat(path).st_mtime_ns for path in (self.cert, self.key, *self.roots))
        except OSError:
            return ()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", errors="surrogateescape")).digest()


def _token(metadata: Metadata) -> str:
    for key, value in metadata:
        if key == AUTHORIZATION and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return ""


def _remedy(members: bool) -> str:
    if members:
        return "workers serve members of the cluster: ask the router, or start with the cluster's cluster_token_file"
    return "send 'authorization: Bearer TOKEN'; pdspec commands take --token-file or PDSPEC_TOKEN"


def _read_file(path: str | Path, field: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise ConfigError(message, field=field, remedy="name a file that can be read") from error
