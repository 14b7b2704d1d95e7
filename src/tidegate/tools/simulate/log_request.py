"""The request of one log line, and the parsers shared by all formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

from tidegate.decision import MAX_COST
from tidegate.policy.key_format import MAX_KEY
from tidegate.policy.paths import MAX_PATH_BYTES
from tidegate.tools.simulate.log_durations import UNKNOWN
from tidegate.tools.simulate.log_times import Malformed

MAX_NAME: Final = 255
"""Maximum characters of an address or a caller's name, longer than any host name. It limits the memory per counter."""
MAX_COST_DIGITS: Final = 20
METHOD: Final = re.compile(r"[A-Z][A-Z_-]{0,31}", re.ASCII)
_ESCAPED: Final = re.compile(r"(\\(?:x[0-9A-Fa-f]{2}|.))", re.DOTALL)
_HEX: Final = "0123456789ABCDEFabcdef"
_AUTHORITY: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}://[^/?#]*")


class Request(NamedTuple):
    """One request of a log. Sorted by time, then by the other fields, so that the order does not depend on the log.

    Args:
        at_us: µs since the epoch.
        ip: canonical address of the client; empty if unknown.
        method: upper-case HTTP method.
        path: without query, as logged but without the log's escapes; truncated if longer than the maximum path.
        subject: value of the field that identifies the caller, at most 255 characters; empty if missing.
        api_key: as logged; empty if missing or longer than the maximum key.
        attributes: a value for each attribute that the parser reads, in its order, at most 255 characters; empty if missing.
        named: key id, customer and tier that Tidegate named to the gateway that logged it; empty if the log has none of them.
        cost: units, 0 to 1,000,000,000; 1 if the log has none.
        duration_us: how long it took; below 0 if that is not known.
    """

    at_us: int
    ip: str
    method: str
    path: str
    subject: str
    api_key: str
    attributes: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    cost: int = 1
    duration_us: int = UNKNOWN

    def lasting(self, duration_us: int, is_end: bool) -> Request:
        """The request with its duration, at the time at which it started.

        Args:
            duration_us: µs, or `UNKNOWN`.
            is_end: whether the logged time is that of its end.
        """
        at_us = max(self.at_us - duration_us, 0) if is_end and duration_us > 0 else self.at_us
        return self._replace(at_us=at_us, duration_us=duration_us)


Parse: TypeAlias = Callable[[str], Request]


class NoAddress(Malformed):
    """A line whose client is not an address; a live check rejects it with 400."""

    def __init__(self, client: str) -> None:
        super().__init__(f"the client {client[:60]!r} is not an IPv4 or IPv6 address")


class Directive(Exception):
    """A line that belongs to the format (`#Fields: …`) and is not a request."""


def request_of_line(request: str) -> tuple[str, str]:
    """Method and path (without query) of a logged request line such as `GET /a?b HTTP/1.1`, without quotes.

    Raises:
        Malformed: if it is not a request line.
    """
    parts = request.split(" ")
    if len(parts) not in (2, 3) or not METHOD.fullmatch(parts[0]):
        raise Malformed(f"no HTTP request in {request[:60]!r}")
    return parts[0], path_of(parts[1])


def path_of(target: str) -> str:
    """The path of a logged request target (a path with query, or a complete URL).

    Returns:
        The path without query and without the log's escapes; truncated if longer than the maximum path.
    """
    path = target
    if not path.startswith("/") and (match := _AUTHORITY.match(path)):
        path = path[match.end() :]
        if not path.startswith("/"):
            path = "/" + path
    path = path.partition("?")[0]
    if "\\" in path:
        # An escape has at most 4 characters and stands for at least one.
        path = replace_escapes(path[: 4 * (MAX_PATH_BYTES + 1)], _UNESCAPED)
    return path[: MAX_PATH_BYTES + 1]


def name_of(value: object) -> str:
    """A caller's name from a logged value: at most 255 characters; empty if there is no value.

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


def cost_of(value: object) -> int:
    """The units of a request from a logged value; 1 if there is none.

    Raises:
        Malformed: if it is not a whole number from 0 to 1,000,000,000.
    """
    if value is None or value in ("", "-"):
        return 1
    cost = value
    if type(value) is str and len(value) <= MAX_COST_DIGITS and value.isascii() and value.isdigit():
        cost = int(value)
    if type(value) is float and value.is_integer():
        cost = int(value)
    if type(cost) is not int or not 0 <= cost <= MAX_COST:
        raise Malformed(f"the cost {str(value)[:40]!r} is not a whole number from 0 to {MAX_COST:,}")
    return cost


def key_of(value: object) -> str:
    """The API key from a logged value; empty if it cannot be a key."""
    return value if isinstance(value, str) and value != "-" and len(value) <= MAX_KEY else ""


def replace_escapes(text: str, replacements: Mapping[str, str]) -> str:
    """Replace all escapes; those in the table do not cost a Python call each.

    Args:
        text: as logged.
        replacements: by escape, with the backslash; it must return a value for every escape.
    """
    pieces = _ESCAPED.split(text)
    pieces[1::2] = map(replacements.__getitem__, pieces[1::2])
    return "".join(pieces)


class _Unescaped(dict[str, str]):
    r"""The text of a server's escapes `\xNN`, `\"`, `\\` and `\n`; bytes beyond ASCII are percent-encoded.

    Common escapes are in the table, because others cost a call.
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
    r"""`\xNN`, which is not valid JSON, as `\u00NN`; other escapes are unchanged."""

    def __init__(self) -> None:
        super().__init__({f"\\{chr(code)}": f"\\{chr(code)}" for code in range(128)})
        self |= {rf"\x{digits}": rf"\u00{digits}" for digits in _BYTES}

    def __missing__(self, escape: str) -> str:
        return escape


_BYTES: Final = [first + second for first in _HEX for second in _HEX]
_UNESCAPED: Final = _Unescaped()
FOR_JSON: Final[Mapping[str, str]] = _ForJson()
"""Escapes of nginx's default log format → JSON's."""
