"""Certificates as settings, and paths that hold wherever a worker runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pdspec.errors import ConfigError
from pdspec.settings import Settings, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TlsConfig(Settings):
    """Certificates as PEM files, whose paths hold on every node. All empty: plain text."""

    cert: str = option("", "certificate chain of this process")
    key: str = option("", "private key of cert")
    ca: str = option("", "authority that signs the certificates of the cluster's members")
    client_ca: str = option("", "authority of users' certificates, which the router then asks for")
    name: str = option("", "name in the certificates, where addresses are not in them")

    def __post_init__(self) -> None:
        super().__post_init__()
        make_absolute(self, "cert", "key", "ca", "client_ca")
        if bool(self.cert) != bool(self.key):
            missing = "tls.key" if self.cert else "tls.cert"
            raise ConfigError("a certificate and its key belong together", field=missing, remedy=f"give {missing}")
        if self.client_ca and not self.cert:
            raise ConfigError("without tls.cert nothing is encrypted", field="tls.cert", remedy="give tls.cert")


def make_absolute(settings: Settings, *names: str) -> None:
    """Workers run in folders of their own: a path counts from where the settings were made."""
    for name in names:
        if path := getattr(settings, name):
            object.__setattr__(settings, name, whole_path(path))


def whole_path(path: str) -> str:
    """As an absolute path."""
    return str(Path(path).expanduser().absolute())


def check_members(tls: TlsConfig) -> None:
    """A member both shows a certificate and checks those of others. Raises ConfigError."""
    if bool(tls.cert) != bool(tls.ca):
        missing = "tls.ca" if tls.cert else "tls.cert"
        raise ConfigError("members show certificates to each other", field=missing, remedy=f"give {missing}, too")
