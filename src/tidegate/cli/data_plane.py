"""One question over HTTP, as a command asks it: blocking, a connection for each, through the standard library.

What went wrong comes out as a reason and a remedy. A redirect is an answer as any other: nothing is sent on to where it points.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tidegate.client.server_url import Server
from tidegate.errors import SettingsError, TidegateError

_MAX_BYTES: Final = 100_000_000
_TIMEOUT_S: Final = 5.0
# What OpenSSL says where a certificate is good, but for another name or address.
_OTHER_NAME: Final = frozenset({62, 64})


class Answer(msgspec.Struct, frozen=True):
    """What a server answered.

    Args:
        status: of HTTP.
        headers: names in lower case → values.
        body: as it came.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json_object(self) -> dict[str, Any] | None:
        """The body as a JSON object.

        Returns:
            The object; None where the body is none.
        """
        try:
            told = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return told if isinstance(told, dict) else None


class NoAnswer(TidegateError):
    """The server did not answer.

    Args:
        reason: why, as a part of a sentence.
        remedy: what to do about it; None for the usual: start it, or give another address.
        sent: whether the question went out. Then it may have been acted on.
    """

    code = "NO_ANSWER"

    def __init__(self, reason: str, remedy: str | None, sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.sent = sent


def ask(
    server: Server,
    method: str,
    path: str,
    *,
    timeout_s: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Ask a server something.

    Args:
        server: where it is.
        method: of HTTP.
        path: with its query, from `/` on.
        timeout_s: how long to connect, and how long to wait whenever nothing comes, s.
        body: JSON, or None for none.
        headers: besides the usual ones.

    Returns:
        The answer, whatever its status.

    Raises:
        NoAnswer: if none came, or only a part of one.
    """
    connection = (
        # The context trusts the system's authorities, or those of SSL_CERT_FILE.
        http.client.HTTPSConnection(server.host, server.port, timeout=timeout_s, context=ssl.create_default_context())
        if server.tls
        else http.client.HTTPConnection(server.host, server.port, timeout=timeout_s)
    )
    sent = False
    try:
        connection.connect()
        sent = True
        typed = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, server.path + path, body, {"Accept": "application/json", **typed, **(headers or {})})
        response = connection.getresponse()
        content = response.read(_MAX_BYTES)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason, remedy = _why(error, server, timeout_s)
        raise NoAnswer(reason, remedy, sent) from None
    finally:
        connection.close()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)


def ask_data_plane(address: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Ask the data plane something.

    Args:
        address: `http://host:port`, or as `--url` gives it.
        path: from `/` on.
        body: makes it a POST.

    Returns:
        The status, and the object that was answered.

    Raises:
        SettingsError: if nobody answers there, or what does is not Tidegate.
    """
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
    try:
        answer = ask(Server.at(address), method, path, timeout_s=_TIMEOUT_S, body=content)
    except NoAnswer as error:
        remedy = error.remedy or "start it with 'tidegate serve', or give --url"
        raise SettingsError(f"no Tidegate answers at {address} ({error.reason}): {remedy}") from None
    told = answer.json_object()
    if told is None:
        raise SettingsError(f"what answers at {address} is not Tidegate: give --url")
    return answer.status, told


def _why(error: Exception, server: Server, timeout_s: float) -> tuple[str, str | None]:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OTHER_NAME:
            return f"its certificate is not for {server.host}", "give the URL with the name that is in the certificate"
        return (
            f"its certificate is not trusted, {error.verify_message}",
            "make this system trust its authority, or name the authority's file in SSL_CERT_FILE",
        )
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS as it should, {error.reason or 'it ended'}", "write http:// where no TLS stands before it"
    if isinstance(error, TimeoutError):
        return f"it did not answer within {timeout_s:g} s", None
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closed the connection without an answer", "give another URL, with https:// where it speaks TLS"
    if isinstance(error, http.client.IncompleteRead):
        return "its answer was cut off", "try again"
    if isinstance(error, http.client.HTTPException):
        return "what is there does not speak HTTP", "give another URL, with https:// where it speaks TLS"
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"the name {server.host!r} is not found", "give another URL"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower(), None
