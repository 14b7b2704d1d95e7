"""The request that one line of a log stands for, and the pieces that every format shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

from tidegate.policy.paths import MAX_PATH_BYTES
from tidegate.tools.simulate.log_times import Malformed

MAX_NAME: Final = 255
"""Most characters of an address or a caller's name: more than a host name has. What is counted stays bounded by it."""
METHOD: Final = re.compile(r"[A-Z][A-Z_-]{0,31}", re.ASCII)
_ESCAPED: Final = re.compile(r"(\\(?:x[0-9A-Fa-f]{2}|.))", re.DOTALL)
_HEX: Final = "0123456789ABCDEFabcdef"
_MAX_KEY: Final = 128
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
        # An escape has at most 4 characters and stands for at least one.
        path = replace_escapes(path[: 4 * (MAX_PATH_BYTES + 1)], _UNESCAPED)
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


def replace_escapes(text: str, replacements: Mapping[str, str]) -> str:
    """Replace escapes without a call in Python for each of those that are known.

    Args:
        text: as logged.
        replacements: by escape, with the backslash; it must have an answer for every one.

    Returns:
        The text with all of them replaced.
    """
    pieces = _ESCAPED.split(text)
    pieces[1::2] = map(replacements.__getitem__, pieces[1::2])
    return "".join(pieces)


class _Unescaped(dict[str, str]):
    r"""What a server wrote as `\xNN`, `\"`, `\\` or `\n`, by its escape; bytes beyond ASCII are percent-encoded.

    All that is common is in the table, because what is not costs a call.
    """

    def __init__(self) -> None:
        super().__init__({f"\\{chr(code)}": chr(code) for code in range(128)})
        self |= {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\b": "\b", r"\f": "\f", r"\v": "\v"}
        for digits in _BYTES:
            byte = int(digits, 16)
            self[rf"\x{digits}"] = chr(byte) if byte < 0x80 else f"%{byte:02X}"

    def __missing__(self, escape: str) -> str:
        return escape[1:]


class _ForJson(dict[str, str]):
    r"""`\xNN`, which JSON has not, as `\u00NN`; every other escape stays."""

    def __init__(self) -> None:
        super().__init__({f"\\{chr(code)}": f"\\{chr(code)}" for code in range(128)})
        self |= {rf"\x{digits}": rf"\u00{digits}" for digits in _BYTES}

    def __missing__(self, escape: str) -> str:
        return escape


_BYTES: Final = [first + second for first in _HEX for second in _HEX]
_UNESCAPED: Final = _Unescaped()
FOR_JSON: Final[Mapping[str, str]] = _ForJson()
"""Escapes of nginx's default log format → JSON's."""
