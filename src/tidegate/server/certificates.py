"""The files of `[tls]`: read, checked, and read again when they change.

New handshakes use the newest files that are valid; open connections keep what they began with. Files that cannot be used are
reported in the log and in `/health`, and the previous ones stay in use.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import ssl
import time
from pathlib import Path
from typing import Any, Final

import msgspec

from tidegate.certificate_names import canonical_name
from tidegate.doors.tls import ServerTls, TlsFiles
from tidegate.errors import PolicyError, SettingsError
from tidegate.policy.file_watcher import Look, identity_of, is_old, watch
from tidegate.settings import TlsSettings

logger = logging.getLogger(__name__)

POLL_S: Final = 1.0
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2: forward secrecy and authenticated encryption. TLS 1.3 has no others."""

_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL: expiry is reported with a sentence of its own."""
_ERRORS: Final = {
    "KEY_VALUES_MISMATCH": "the private key in {key} does not match the certificate in {cert}; set the key of that certificate",
    "EE_KEY_TOO_SMALL": "the key of the certificate in {cert} is too short; use ECDSA P-256, or RSA with 2048 bits or more",
    "CA_MD_TOO_WEAK": "the certificate in {cert} is signed with a hash that is too weak; issue it with SHA-256",
}


class CertificateError(SettingsError):
    """Files of `[tls]` that cannot be used."""

    code = "TLS_CERTIFICATE"


def read_files(tls: TlsSettings) -> TlsFiles:
    """Read the files of `[tls]`.

    Raises:
        CertificateError: if one is missing or unreadable.
    """
    cert = _read("cert", tls.cert)
    key = _read("key", tls.key) if tls.key else cert
    return TlsFiles(cert, key, _read("client_ca", tls.client_ca) if tls.client_ca else b"")


class Loaded(msgspec.Struct, frozen=True):
    """Files that can be used.

    Args:
        files: what they hold.
        context: for new handshakes of HTTP.
        not_before: when the certificate becomes valid, s since the epoch.
        expires: when the first certificate of each file expires, s since the epoch, by name of the setting.
    """

    files: TlsFiles
    context: ssl.SSLContext
    not_before: float
    expires: dict[str, float]

    def invalid_now(self, tls: TlsSettings) -> str | None:
        """Why clients will refuse the certificate at this time; None if they will not."""
        now = time.time()
        if now < self.not_before:
            return f"the certificate in tls.cert = {tls.cert!r} is not valid before {utc_date(self.not_before)}; check the clock"
        if now >= self.expires["cert"]:
            return f"the certificate in tls.cert = {tls.cert!r} expired on {utc_date(self.expires['cert'])}; renew it"
        return None


def load(tls: TlsSettings, files: TlsFiles | None = None) -> Loaded:
    """Check the files of `[tls]` and prepare them for handshakes.

    Args:
        tls: where they are.
        files: what they hold, if they have been read.

    Returns:
        What new handshakes use.

    Raises:
        CertificateError: naming the setting, the file, what is wrong with it and the remedy.
    """
    files = files or read_files(tls)
    _require_pem(tls, files)
    context = _server_context(tls)
    leaf = _examine(tls, context, files.cert)
    expires = {"cert": min([_seconds(leaf["notAfter"]), *_expiries(files.cert)])}
    if files.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=_certificates(files.client_ca))
        except (ssl.SSLError, ValueError) as error:
            raise CertificateError(f"tls.client_ca = {tls.client_ca!r} has a damaged certificate: {_reason(error)}") from None
        authorities = _expiries(files.client_ca)
        if not authorities:
            raise CertificateError(
                f"tls.client_ca = {tls.client_ca!r} has no certificate of an authority (CA:TRUE); set the file of the authority "
                "that signs client certificates"
            )
        expires["client_ca"] = min(authorities)
    return Loaded(files, context, _seconds(leaf["notBefore"]), expires)


class Certificates:
    """The certificates of the listeners of one instance.

    Args:
        tls: settings, with a certificate.

    Raises:
        CertificateError: if the files cannot be used.
    """

    def __init__(self, tls: TlsSettings) -> None:
        self._tls = tls
        self._refusal: str | None = None
        self.reloads = 0
        self.reload_errors = 0
        self.loaded = load(tls)
        invalid = self.loaded.invalid_now(tls)
        if invalid is not None:
            logger.error("clients will refuse to connect: %s", invalid)

    def tls_of(self, door: str) -> ServerTls | None:
        """For an HTTP listener; None if it is not one of `tls.doors`."""
        return ServerTls(lambda: self.loaded.context, self.client_names) if door in self._tls.doors else None

    @property
    def client_names(self) -> frozenset[str]:
        """Names of which a client's certificate needs one, in canonical form; empty for any."""
        return frozenset(name for text in self._tls.client_names if (name := canonical_name(text)) is not None)

    def expiries(self) -> dict[str, float]:
        """When the first certificate of each file in use expires, s since the epoch, by name of the setting."""
        return self.loaded.expires

    async def ping(self) -> None:
        """Raise if the certificate in use is expired, or the files that are there now cannot be used.

        Raises:
            CertificateError: saying which.
        """
        invalid = self.loaded.invalid_now(self._tls)
        if invalid is not None:
            raise CertificateError(invalid, reason="certificate expired or not yet valid")
        if self._refusal is not None:
            raise CertificateError(self._refusal, reason="new files refused, previous ones in use")

    async def watch(self, again: asyncio.Event) -> None:
        """Load the files again whenever they change, until cancelled.

        Args:
            again: set to load them in any case.
        """
        await watch(self._look, self._apply, self._refused, POLL_S, again)

    def _look(self, last: Look) -> Look:
        try:
            paths = [Path(file) for file in (self._tls.cert, self._tls.key, self._tls.client_ca) if file]
            identities = [identity_of(path) for path in paths]
            identity = tuple(each for each, _ in identities)
            if identity == last.identity and all(is_old(changed_s) for _, changed_s in identities):
                return last
        except OSError:
            identity = ()  # what is missing is reported by the reading below
        try:
            return Look(identity or None, read_files(self._tls))
        except CertificateError as error:
            return Look(None, None, PolicyError(error.message))

    async def _apply(self, files: TlsFiles) -> None:
        if files == self.loaded.files and self._refusal is None:
            return
        try:
            loaded = await asyncio.to_thread(load, self._tls, files)
        except CertificateError as error:
            raise PolicyError(error.message) from None
        invalid = loaded.invalid_now(self._tls)
        if invalid is not None and self.loaded.invalid_now(self._tls) is None:
            raise PolicyError(invalid)
        self._refusal = None
        if files == self.loaded.files:
            logger.info("the files of [tls] are valid again")
            return
        self.loaded = loaded
        self.reloads += 1
        logger.info("new certificate loaded from tls.cert = %s, valid until %s", self._tls.cert, utc_date(loaded.expires["cert"]))

    def _refused(self, error: PolicyError) -> None:
        self._refusal = error.message
        self.reload_errors += 1
        logger.error("new files of [tls] refused, the previous ones stay in use: %s", error.message)


def _read(name: str, file: str) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise CertificateError(f"tls.{name} = {file!r} does not exist; set the path of a PEM file") from None
    except OSError as error:
        raise CertificateError(
            f"tls.{name} = {file!r} cannot be read: {error.strerror or error}; make it readable for the user that runs Tidegate"
        ) from None
    if len(content) > MAX_FILE_BYTES:
        raise CertificateError(f"tls.{name} = {file!r} has more than {MAX_FILE_BYTES} bytes; set the path of a PEM file")
    return content


def _require_pem(tls: TlsSettings, files: TlsFiles) -> None:
    key_name, key_file = ("key", tls.key) if tls.key else ("cert", tls.cert)
    for name, file, content in (("cert", tls.cert, files.cert), ("client_ca", tls.client_ca, files.client_ca)):
        if file and not _CERTIFICATE.search(content):
            found = "a private key, but no certificate" if b"PRIVATE KEY-----" in content else "no PEM certificate"
            raise CertificateError(
                f"tls.{name} = {file!r} has {found} (-----BEGIN CERTIFICATE-----); convert DER with 'openssl x509 -inform der'"
            )
    if b"PRIVATE KEY-----" not in files.key:
        found = "a certificate, but no private key" if _CERTIFICATE.search(files.key) else "no PEM private key"
        remedy = "set tls.key" if key_name == "cert" else "set the file with the key of the certificate"
        raise CertificateError(f"tls.{key_name} = {key_file!r} has {found} (-----BEGIN PRIVATE KEY-----); {remedy}")
    if b"ENCRYPTED" in files.key:
        raise CertificateError(
            f"tls.{key_name} = {key_file!r} has a private key with a passphrase; remove it with "
            f"'openssl pkey -in {key_file} -out NEW_FILE' and protect the file with its permissions"
        )


def _server_context(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A passphrase would be asked for on the terminal.
        context.load_cert_chain(tls.cert, tls.key or None, password="")
    except ssl.SSLError as error:
        text = _ERRORS.get(error.reason or "")
        key = f"tls.key = {tls.key!r}" if tls.key else f"tls.cert = {tls.cert!r}"
        if text is not None:
            raise CertificateError(text.format(cert=f"tls.cert = {tls.cert!r}", key=key)) from None
        raise CertificateError(
            f"tls.cert = {tls.cert!r} and its key in {key} cannot be used: {_reason(error)}; check them with "
            "'openssl x509 -text -noout' and 'openssl pkey -check -noout'"
        ) from None
    except OSError as error:  # removed since it was read
        raise CertificateError(f"tls.cert = {tls.cert!r} or its key cannot be read: {error.strerror or error}") from None
    return context


def _examine(tls: TlsSettings, context: ssl.SSLContext, cert: bytes) -> dict[str, Any]:
    """Do a handshake in memory with a client that trusts this certificate alone: what a client would refuse is found here.

    Returns:
        The certificate, as `ssl.SSLSocket.getpeercert`.
    """
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags = ssl.VerifyFlags(ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME)
    client_context.load_verify_locations(cadata=_certificates(cert, 1))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server)
    try:
        for _ in range(4):  # the flights of one handshake
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(
            f"clients would refuse the certificate in tls.cert = {tls.cert!r}: {error.verify_message}; issue it for servers "
            "(extended key usage serverAuth)"
        ) from None
    except ssl.SSLError as error:
        raise CertificateError(f"no handshake is possible with tls.cert = {tls.cert!r}: {_reason(error)}") from None
    return dict(client.getpeercert() or {})


def _expiries(pem: bytes) -> list[float]:
    """When the authorities in a file expire."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=_certificates(pem))
    return [_seconds(str(each["notAfter"])) for each in context.get_ca_certs()]


def _certificates(pem: bytes, most: int | None = None) -> str:
    """The certificates of a file, without comments and keys; only the first ones if `most` is given."""
    return b"\n".join(_CERTIFICATE.findall(pem)[:most]).decode("ascii", "replace")


def _seconds(text: str) -> float:
    return float(ssl.cert_time_to_seconds(text))


def utc_date(seconds: float) -> str:
    """A time as a text, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _reason(error: ssl.SSLError | ValueError) -> str:
    text = re.sub(r"\[[^\]]*\] ?| ?\(_ssl\.c:\d+\)", "", getattr(error, "reason", None) or str(error)).lower().replace("_", " ")
    return "it is damaged" if text == "pem lib" else text
