"""Certificates with which commands connect to a server over TLS."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from tidegate.errors import SettingsError
from tidegate.listen_address import listener_url
from tidegate.settings import Settings

CaOption = Annotated[
    Path | None,
    typer.Option("--ca", help="For an https URL: PEM file of the authority that signed the server's certificate."),
]
CertOption = Annotated[
    Path | None,
    typer.Option("--cert", help="For an https URL: PEM file with the client certificate, if the server requires one."),
]
CertKeyOption = Annotated[
    Path | None, typer.Option("--key", help="PEM file with the key of --cert; default: the key is in the file of --cert.")
]


class ClientTls(msgspec.Struct, frozen=True):
    """Files of a client.

    Args:
        ca: authorities that are trusted; None for those of the system, or of SSL_CERT_FILE.
        cert: certificate of the client; None for none.
        key: its key; None if it is in the file of the certificate.
        pinned: certificate of the server itself, trusted for any name; None for none.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    pinned: Path | None = None

    def context(self) -> ssl.SSLContext:
        """What a connection is made with.

        Raises:
            SettingsError: naming the option, the file and what is wrong with it.
        """
        if self.key is not None and self.cert is None:
            raise SettingsError("--key needs --cert, the file with the client certificate")
        if self.pinned is None:
            context = ssl.create_default_context()
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        for option, file in (("--ca", self.ca), ("tls.cert", self.pinned)):
            if file is not None:
                try:
                    context.load_verify_locations(cafile=file)
                except OSError as error:
                    raise SettingsError(f"{option} {file} cannot be used: {_reason(error)}; give a PEM file") from None
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key, password="")
            except OSError as error:
                raise SettingsError(
                    f"--cert {self.cert} and its key {self.key or 'in the same file'} cannot be used: {_reason(error)}; give PEM "
                    "files of a certificate and its key, without a passphrase"
                ) from None
        return context


NO_FILES: Final = ClientTls()


def own_data_plane(settings: Settings, tls: ClientTls = NO_FILES) -> tuple[str, ClientTls]:
    """The data plane of the settings of this machine: its certificate is trusted without its authority.

    Args:
        tls: given on the command line.

    Returns:
        The URL, and the files for it.
    """
    url = listener_url(settings.server.http, settings.uses_tls("http"))
    return url, own_tls(settings, url, tls)


def own_tls(settings: Settings, url: str, tls: ClientTls) -> ClientTls:
    """The files for a listener of the settings of this machine: its certificate is trusted without its authority.

    Args:
        url: of the listener.
        tls: given on the command line.
    """
    if not url.startswith("https:") or tls.ca is not None:
        return tls
    return msgspec.structs.replace(tls, pinned=Path(settings.tls.cert))


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it is damaged").lower().replace("_", " ")
    return error.strerror or str(error)
