"""Where a request carries its API key: a header, `Authorization: Bearer`, or a parameter of the query."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

from tidegate.doors.request_headers import RequestHeaders, single
from tidegate.errors import BadRequest, SettingsError

DEFAULT_SOURCES: Final = ("header:X-API-Key",)
MAX_SOURCES: Final = 8

_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", re.ASCII)
_PARAMETER: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_NO_KEYS: Final = frozenset(("authorization", "cookie", "proxy-authorization", "host"))
_SCHEME: Final = "bearer"
_JWT: Final = re.compile(r"eyJ[\w-]*+(?:\.[\w-]*+){2}(?:(?:\.[\w-]*+){2})?", re.ASCII)
"""A JSON Web Token, signed (three parts) or encrypted (five): its first part is base64 that begins with `{"`."""


class KeySources:
    """Where requests carry API keys.

    Args:
        sources: such as `header:X-API-Key`, `bearer` and `query:api_key`; the first that a request has decides.

    Attributes:
        is_default: whether it is the header X-API-Key alone.
        bearer: whether `Authorization: Bearer` is read.
        headers: that are read, in lower case.
        more_headers: those without X-API-Key.

    Raises:
        SettingsError: naming the source that is not valid.
    """

    def __init__(self, sources: Iterable[str] = DEFAULT_SOURCES) -> None:
        given = tuple(sources)
        self._sources = tuple(_parsed(source) for source in given)
        if not 1 <= len(given) <= MAX_SOURCES or len(set(self._sources)) < len(given):
            raise SettingsError(f"keys.sources has {len(given)} entries: name 1 to {MAX_SOURCES} different ones")
        self.bearer = ("bearer", "") in self._sources
        names = [name for kind, name in self._sources if kind == "header"]
        self.headers = (*names, "authorization") if self.bearer else tuple(names)
        self.more_headers = tuple(name for name in self.headers if name != "x-api-key")
        self.is_default = self._sources == (("header", "x-api-key"),)

    def read(self, headers: RequestHeaders, query: str) -> str | None:
        """The API key of a request.

        Args:
            query: of the request's URI, as it came, without the `?`.

        Returns:
            The key as it came; None where no source has one.

        Raises:
            BadRequest: if a header or a parameter came twice, or is not ASCII.
        """
        for kind, name in self._sources:
            if kind == "header":
                key = single(headers, name)
            elif kind == "query":
                key = _parameter(query, name) if query else None
            else:
                key = bearer_key(headers)
            if key:
                return key
        return None


def bearer_key(headers: RequestHeaders) -> str | None:
    """The bearer token of a request; None without one, or where it is a JSON Web Token.

    Raises:
        BadRequest: if the header came twice, or is not ASCII.
    """
    value = single(headers, "authorization")
    if not value:
        return None
    scheme, _, token = value.partition(" ")
    token = token.strip()
    return token if scheme.lower() == _SCHEME and token and not is_jwt(token) else None


def is_jwt(token: str) -> bool:
    """Whether a token has the form of a JSON Web Token."""
    return _JWT.fullmatch(token) is not None


def _parameter(query: str, name: str) -> str | None:
    found = None
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if key == name or ("%" in key and unquote(key) == name):
            if found is not None:
                raise BadRequest(f"the parameter {name} came more than once in the query: send it once", field=name)
            found = unquote(value)
    return found


def _parsed(source: object) -> tuple[str, str]:
    kind, _, name = source.partition(":") if isinstance(source, str) else ("", "", "")
    if kind == "bearer" and not name:
        return kind, ""
    if kind == "header" and _HEADER.fullmatch(name) and name.lower() not in _NO_KEYS:
        return kind, name.lower()
    if kind == "query" and _PARAMETER.fullmatch(name):
        return kind, name
    raise SettingsError(
        f"keys.sources has {str(source)[:80]!r}: write header:X-API-Key, bearer or query:api_key; Authorization and Cookie carry "
        "more than a key"
    )
