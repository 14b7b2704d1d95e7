"""What the HTTP doors refuse before anything is decided, and what they answer where they themselves are at fault."""

from __future__ import annotations

from typing import Final

from tidegate.errors import TidegateError, clip


class NotFound(TidegateError):
    """There is nothing at this path."""

    code = "NOT_FOUND"
    status = 404


class MethodNotAllowed(TidegateError):
    """The path is there, the method is not."""

    code = "METHOD_NOT_ALLOWED"
    status = 405


class BodyTooSlow(TidegateError):
    """The body did not arrive in time."""

    code = "REQUEST_TIMEOUT"
    status = 408


class RequestTooSlow(TidegateError):
    """The headers did not arrive in time."""

    code = "REQUEST_TIMEOUT"
    status = 408


class TooManyConnections(TidegateError):
    """Every connection that may be open is in use."""

    code = "TOO_MANY_CONNECTIONS"
    status = 503


class ClientNotAllowed(TidegateError):
    """The certificate of the client has none of the names that are allowed."""

    code = "CLIENT_NOT_ALLOWED"
    status = 403


class HeadersTooLarge(TidegateError):
    """The headers are larger than any check needs."""

    code = "HEADERS_TOO_LARGE"
    status = 431


class InternalError(TidegateError):
    """A fault of ours; the log says more."""

    code = "INTERNAL"
    status = 503


class UnsupportedEncoding(TidegateError):
    """The body is compressed."""

    code = "UNSUPPORTED_MEDIA_TYPE"
    status = 415


IDENTITY: Final = frozenset(("", "identity"))
"""Values of Content-Encoding that say nothing."""


def unsupported_encoding(encoding: str) -> UnsupportedEncoding:
    """The refusal of a body that would have to be unpacked, and so could be of any size.

    Args:
        encoding: the value of Content-Encoding.
    """
    return UnsupportedEncoding(f"the body has the Content-Encoding {clip(encoding)}: send it as it is, without one")
