"""The files of `[tls]`: one sentence for each thing that can be wrong, and what happens when they change."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.moments import until
from tests.servers.certificates import Authority
from tidegate.server import certificates
from tidegate.server.certificates import CertificateError, Certificates, load
from tidegate.settings import TlsSettings

ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAA==\n-----END ENCRYPTED PRIVATE KEY-----\n"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def of(authority: Authority, **files: object) -> TlsSettings:
    given = {"cert": authority.server_cert, "key": authority.server_key, **files}
    return TlsSettings(**{name: str(file) for name, file in given.items()})


def written(authority: Authority, name: str, content: bytes) -> Path:
    file = authority.directory / name
    file.write_bytes(content)
    return file


def damaged(file: Path) -> bytes:
    """PEM whose lines are base64 of something else."""
    first, *lines, last = file.read_text().strip().splitlines()
    return "\n".join([first, *(line[::-1].replace("=", "A") for line in lines), last, ""]).encode()


def test_valid_files(authority: Authority) -> None:
    loaded = load(of(authority, client_ca=authority.ca))
    assert loaded.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert loaded.context.verify_mode == ssl.CERT_REQUIRED
    names = [cipher["name"] for cipher in loaded.context.get_ciphers()]
    assert all(name.startswith(("TLS_", "ECDHE-")) for name in names), names
    assert set(loaded.expires) == {"cert", "client_ca"}
    assert load(of(authority)).context.verify_mode == ssl.CERT_NONE
    both = written(authority, "both.pem", authority.server_cert.read_bytes() + authority.server_key.read_bytes())
    assert load(TlsSettings(cert=str(both))).expires["cert"] == loaded.expires["cert"]


WRONG: dict[str, tuple[Callable[[Authority], TlsSettings], str]] = {
    "no file": (lambda each: of(each, cert=each.directory / "absent"), r"tls\.cert = .*absent' does not exist"),
    "a directory": (lambda each: of(each, key=each.directory), r"tls\.key = .* cannot be read: Is a directory"),
    "the key of another": (lambda each: of(each, key=each.client_key), r"tls\.key = .*client\.key' does not match .*server\.pem"),
    "a key as certificate": (lambda each: of(each, cert=each.server_key), r"has a private key, but no certificate"),
    "a certificate as key": (lambda each: of(each, key=each.server_cert), r"has a certificate, but no private key"),
    "no key at all": (lambda each: of(each, key=""), r"tls\.cert = .* has a certificate, but no private key .*; set tls\.key"),
    "DER": (
        lambda each: of(each, cert=written(each, "der", ssl.PEM_cert_to_DER_cert(each.server_cert.read_text()))),
        r"no PEM certificate .* convert DER with",
    ),
    "a damaged certificate": (
        lambda each: of(each, cert=written(each, "damaged.pem", damaged(each.server_cert))),
        r"damaged\.pem' and its key in .* cannot be used",
    ),
    "a damaged key": (lambda each: of(each, key=written(each, "damaged.key", damaged(each.server_key))), r"cannot be used"),
    "a key with a passphrase": (
        lambda each: of(
            each,
            key=written(each, "enc.key", ENCRYPTED),
        ),
        r"a private key with a passphrase; remove it with 'openssl pkey",
    ),
    "a key as authority": (
        lambda each: of(each, client_ca=each.server_key),
        r"tls\.client_ca = .* no certificate",
    ),
    "no authority": (lambda each: of(each, client_ca=each.client_cert), r"tls\.client_ca .* \(CA:TRUE\)"),
    "a damaged authority": (
        lambda each: of(each, client_ca=written(each, "ca-damaged.pem", damaged(each.ca))),
        r"tls\.client_ca = .*ca-damaged\.pem' has a damaged certificate",
    ),
    "a huge file": (
        lambda each: of(each, cert=written(each, "huge", b"#" * (certificates.MAX_FILE_BYTES + 1))),
        r"huge' has more than",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_file_gives_one_sentence(authority: Authority, name: str) -> None:
    settings, said = WRONG[name]
    with pytest.raises(CertificateError, match=said) as refused:
        load(settings(authority))
    assert "\n" not in refused.value.message


def test_an_expired_certificate_is_reported_and_a_valid_one_is_not(authority: Authority) -> None:
    cert, key = authority.issue("expired", "localhost", not_before=LONG_AGO, not_after=LONG_AGO + timedelta(days=90))
    settings = of(authority, cert=cert, key=key)
    assert (load(settings).invalid_now(settings) or "").endswith("expired on 2020-03-31T00:00:00Z; renew it")
    future = datetime.now(UTC) + timedelta(days=9)
    cert, key = authority.issue("future", "localhost", not_before=future, not_after=future + timedelta(days=9))
    assert "is not valid before" in (load(of(authority, cert=cert, key=key)).invalid_now(settings) or "")
    assert load(of(authority)).invalid_now(of(authority)) is None


async def test_an_instance_starts_with_an_expired_certificate_and_is_unhealthy(authority: Authority) -> None:
    cert, key = authority.issue("expired", "localhost", not_before=LONG_AGO, not_after=LONG_AGO + timedelta(days=90))
    held = Certificates(of(authority, cert=cert, key=key))
    with pytest.raises(CertificateError, match="expired on 2020-03-31"):
        await held.ping()
    assert held.expiries()["cert"] == (LONG_AGO + timedelta(days=90)).timestamp()


async def test_changed_files_are_used_and_wrong_ones_are_not(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificates, "POLL_S", 0.01)
    cert, key = authority.issue("changing", "localhost")
    original = cert.read_bytes(), key.read_bytes()
    held = Certificates(of(authority, cert=cert, key=key))
    again = asyncio.Event()
    watching = asyncio.create_task(held.watch(again))
    first = held.loaded

    authority.issue("changing", "localhost")
    await until(lambda: held.reloads == 1)
    second = held.loaded
    assert second.files.cert == cert.read_bytes() != first.files.cert
    await held.ping()

    key.write_bytes(original[1])
    await until(lambda: held.reload_errors == 1)
    assert held.loaded is second
    with pytest.raises(CertificateError, match="does not match") as refused:
        await held.ping()
    assert refused.value.details["reason"] == "new files refused, previous ones in use"
    assert "the previous ones stay in use" in caplog.text

    cert.write_bytes(original[0])
    await until(lambda: held.reloads == 2)
    assert held.loaded.files == first.files
    await held.ping()

    authority.issue("changing", "localhost", not_before=LONG_AGO, not_after=LONG_AGO + timedelta(days=1))
    await until(lambda: held.reload_errors == 2)
    assert held.loaded.files == first.files, "a valid certificate is not replaced by an expired one"

    cert.unlink()
    await until(lambda: held.reload_errors == 3)
    again.set()
    await until(lambda: held.reload_errors == 4)
    watching.cancel()
