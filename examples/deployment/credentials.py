"""Certificates for TLS and key pairs of SuperNodes, as Flower wants them, by `cryptography`."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID


def write_node_key(path: Path) -> Path:
    """Writes a SuperNode's key pair in OpenSSH's format and returns the public key's path."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private_key(path, key, PrivateFormat.OpenSSH)
    public_key = path.with_suffix(".pub")
    public_key.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public_key


def _write_private_key(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))


def write_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """Writes an authority (``ca.crt``) and the SuperLink's key and certificate, signed by it."""
    authority, link = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    signs_certificates = x509.KeyUsage(
        *(False, False, False, False, False),
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    root = (
        _certificate("federation authority", authority, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs_certificates, critical=True)
    )
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    leaf = _certificate("federation SuperLink", link, authority).add_extension(names, False)
    for name, builder in (("ca.crt", root), ("server.crt", leaf)):
        signed = builder.sign(authority, hashes.SHA256())
        (folder / name).write_bytes(signed.public_bytes(Encoding.PEM))
    _write_private_key(folder / "server.key", link, PrivateFormat.PKCS8)


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, authority: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    """A certificate of ``key`` without what an authority and a server differ in."""
    subject, issuer = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        for common_name in (name, "federation authority")
    )
    now = datetime.datetime.now(datetime.UTC)
    holder = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(holder, critical=False)
        .add_extension(signer, critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
