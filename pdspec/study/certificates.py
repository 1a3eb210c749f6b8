"""Certificates made at run time: an authority, what it signs, and what it should not have signed."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pdspec.config import TlsConfig

_HOUR = datetime.timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A certificate and its key, as files."""

    cert: str
    key: str


class Authority:
    """Signs certificates of 127.0.0.1 and localhost, valid for an hour; files go to ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self.name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(self._subject, self._key, valid_for=_HOUR)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.ca = self._write(f"{name}.pem", made.sign(self._key, hashes.SHA256()))

    def sign(self, name: str, *, expired: bool = False) -> Signed:
        """A certificate for ``name``; an ``expired`` one ended a minute ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(subject, key, valid_for=-_HOUR / 60 if expired else _HOUR)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        made = made.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        cert = self._write(f"{self.name}-{name}.pem", made.sign(self._key, hashes.SHA256()))
        path = self._folder / f"{self.name}-{name}.key"
        path.touch(mode=0o600)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return Signed(cert=cert, key=str(path))

    def tls(self, signed: Signed, *, client_ca: str = "") -> TlsConfig:
        """The settings of who holds ``signed`` and trusts this authority."""
        return TlsConfig(cert=signed.cert, key=signed.key, ca=self.ca, client_ca=client_ca)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, valid_for: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * _HOUR)
            .not_valid_after(now + valid_for)
        )

    def _write(self, name: str, certificate: x509.Certificate) -> str:
        path = self._folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)
