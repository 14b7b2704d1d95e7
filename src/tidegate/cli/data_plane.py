"""One HTTP request of a command: blocking, on a connection of its own, with the standard library.

Failures are reported with a reason and a remedy. Redirects are not followed.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tidegate.cli.client_tls import NO_FILES, ClientTls
from tidegate.errors import SettingsError, TidegateError
from tidegate.server_url import Server

_MAX_BYTES: Final = 100_000_000
_TIMEOUT_S: Final = 5.0
# Verify codes of OpenSSL for a valid certificate of another name or address.
_OTHER_NAME: Final = frozenset({62, 64})


class HttpResponse(msgspec.Struct, frozen=True):
    """An HTTP response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json_object(self) -> dict[str, Any] | None:
        """The body as a JSON object; None if it is not one."""
        try:
            content = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return content if isinstance(content, dict) else None


class NoResponse(TidegateError):
    """The server did not respond.

    Args:
        reason: the cause, as part of a sentence.
        remedy: what to do; None for the default: start the server, or give another address.
        sent: whether the request was sent. Then it may have been processed.
    """

    code = "NO_ANSWER"

    def __init__(self, reason: str, remedy: str | None, sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.sent = sent


def send_request(
    server: Server,
    method: str,
    path: str,
    *,
    timeout_s: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    tls: ClientTls = NO_FILES,
) -> HttpResponse:
    """Send one HTTP request and return the response, whatever its status.

    Args:
        method: HTTP method.
        path: with its query, starting with `/`.
        timeout_s: limit for connecting, and for each wait for data, s.
        body: JSON, or None for none.
        headers: in addition to the default ones.
        tls: certificates for https.

    Raises:
        SettingsError: if a certificate cannot be used.
        NoResponse: if there is no response, or an incomplete one.
    """
    if server.tls:
        context = tls.context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            server.host, server.port, timeout=timeout_s, context=context
        )
    elif tls.ca or tls.cert or tls.key:
        raise SettingsError(f"--ca, --cert and --key are for TLS: give an https:// URL instead of {server.url}")
    elif server.unix_path:
        connection = _UnixConnection(server.unix_path, timeout_s)
    else:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout_s)
    sent = False
    try:
        connection.connect()
        sent = True
        content_type = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, server.path + path, body, {"Accept": "application/json", **content_type, **(headers or {})})
        response = connection.getresponse()
        content = response.read(_MAX_BYTES)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason, remedy = _reason_and_remedy(error, server, timeout_s)
        raise NoResponse(reason, remedy, sent) from None
    finally:
        connection.close()
    return HttpResponse(response.status, {name.lower(): value for name, value in response.getheaders()}, content)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def request_data_plane(
    address: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    tls: ClientTls = NO_FILES,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Send a request to the data plane.

    Args:
        address: `http://host:port`, `https://host:port`, `unix:/path`, or the value of `--url`.
        path: starting with `/`.
        body: None for a GET, otherwise the JSON body of a POST.
        tls: certificates for https.
        headers: in addition to the default ones.

    Returns:
        The HTTP status and the JSON object of the response.

    Raises:
        SettingsError: if there is no response, or it is not from Tidegate.
    """
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
    try:
        response = send_request(Server.at(address), method, path, timeout_s=_TIMEOUT_S, body=content, headers=headers, tls=tls)
    except NoResponse as error:
        remedy = error.remedy or "start it with 'tidegate serve', or give --url"
        raise SettingsError(f"no Tidegate server responds at {address} ({error.reason}): {remedy}") from None
    content_object = response.json_object()
    if content_object is None:
        raise SettingsError(f"the server at {address} is not Tidegate: give another address with --url")
    return response.status, content_object


def _reason_and_remedy(error: Exception, server: Server, timeout_s: float) -> tuple[str, str | None]:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OTHER_NAME:
            return f"its certificate is not for {server.host}", "give the URL with the name in the certificate"
        return (
            f"its certificate is not trusted, {error.verify_message}",
            "give the file of its authority with --ca, or set SSL_CERT_FILE to it",
        )
    if isinstance(error, ssl.SSLError) and "CERTIFICATE_REQUIRED" in (error.reason or ""):
        return "it requires a client certificate", "give one with --cert and --key"
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
        return f"it refused the client certificate, {error.reason}", "give one of its authorities with --cert and --key"
    if isinstance(error, ssl.SSLError):
        return (
            f"TLS handshake failed, {error.reason or 'the connection was closed'}",
            "give a client certificate with --cert and --key if the server requires one, or use http:// if it does not use TLS",
        )
    if isinstance(error, TimeoutError):
        return f"it did not respond within {timeout_s:g} s", None
    # With TLS 1.3 a server refuses the client certificate after the client has completed the handshake.
    if isinstance(error, http.client.RemoteDisconnected) or (
        server.tls and isinstance(error, ConnectionResetError | BrokenPipeError)
    ):
        return "it closed the connection without a response", (
            "give a client certificate with --cert and --key if it requires one"
            if server.tls
            else "give another URL, with https:// if the server uses TLS"
        )
    if isinstance(error, http.client.IncompleteRead):
        return "its response is incomplete", "try again"
    if isinstance(error, http.client.HTTPException):
        return "it does not speak HTTP", "give another URL, with https:// if the server uses TLS"
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"the name {server.host!r} cannot be resolved", "give another URL"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower(), None
