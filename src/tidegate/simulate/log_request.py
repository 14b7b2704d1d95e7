"""The request that one line of a log stands for, and the pieces that every format shares."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from tidegate.paths import MAX_PATH_BYTES
from tidegate.simulate.log_times import Malformed

MAX_NAME: Final = 255
"""Most characters of an address or a caller's name: more than a host name has. What is counted stays bounded by it."""
METHOD: Final = re.compile(r"[A-Z][A-Z_-]{0,31}", re.ASCII)
ESCAPED: Final = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|(.))", re.DOTALL)
_MAX_KEY: Final = 128
_CONTROL: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}
_AUTHORITY: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}://[^/?#]*")


class Request(NamedTuple):
    """One request of a log; ordered by time, then by the rest, so that equal times have one order whatever the log's.

    Args:
        at_us: µs since the epoch.
        ip: address of the client, canonical; empty where unknown.
        method: upper-case HTTP method.
        path: without query, as logged, escapes of the log taken off; cut where longer than any path may be.
        subject: value of the field that names the caller, at most 255 characters; empty where it is missing.
        api_key: as logged; empty where there is none or it is longer than a key can be.
    """

    at_us: int
    ip: str
    method: str
    path: str
    subject: str
    api_key: str


Parse: TypeAlias = Callable[[str], Request]


class NoAddress(Malformed):
    """A line whose client is not an address; the live door answers such a check with 400."""

    def __init__(self, client: str) -> None:
        super().__init__(f"the client {client[:60]!r} is not an IPv4 or IPv6 address")


class Directive(Exception):
    """A line that is part of the format (`#Fields: …`), not a request."""


def request_of_line(request: str) -> tuple[str, str]:
    """Method and path of a request line as it stands in a log.

    Args:
        request: such as `GET /a?b HTTP/1.1`, without quotes.

    Returns:
        The method and the path without query.

    Raises:
        Malformed: if it is no request line.
    """
    parts = request.split(" ")
    if len(parts) not in (2, 3) or not METHOD.fullmatch(parts[0]):
        raise Malformed(f"no HTTP request in {request[:60]!r}")
    return parts[0], path_of(parts[1])


def path_of(target: str) -> str:
    """The path of a request's target as it stands in a log.

    Args:
        target: path with query, or a whole URL.

    Returns:
        The path without query, escapes of the log taken off; cut where it is longer than any path may be.
    """
    path = target
    if not path.startswith("/") and (found := _AUTHORITY.match(path)):
        path = path[found.end() :]
        if not path.startswith("/"):
            path = "/" + path
    path = path.partition("?")[0]
    if "\\" in path:
        path = ESCAPED.sub(_unescape, path)
    return path[: MAX_PATH_BYTES + 1]


def name_of(value: object) -> str:
    """The value of a field that names a caller.

    Args:
        value: as logged.

    Returns:
        At most 255 characters; empty where there is no value.

    Raises:
        Malformed: if it cannot be a name.
    """
    if value is None or value == "-":
        return ""
    if not isinstance(value, str | int | float):
        raise Malformed("the caller's name must be text or a number")
    text = str(value)
    if len(text) > MAX_NAME:
        raise Malformed(f"the caller's name has more than {MAX_NAME} characters")
    return text


def key_of(value: object) -> str:
    """The value of the field with the API key.

    Args:
        value: as logged.

    Returns:
        The key; empty where it cannot be one.
    """
    return value if isinstance(value, str) and value != "-" and len(value) <= _MAX_KEY else ""


def _unescape(found: re.Match[str]) -> str:
    r"""What a server wrote as `\xNN`, `\"`, `\\` or `\n`; bytes beyond ASCII come back percent-encoded."""
    if found[1]:
        byte = int(found[1], 16)
        return chr(byte) if byte < 0x80 else f"%{byte:02X}"
    return _CONTROL.get(found[2], found[2])
