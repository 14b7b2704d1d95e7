"""Request headers that a decision depends on, read the same way at every door.

A header that is present is never treated as absent. One whose value cannot be read, or that came twice, is refused with 400:
the next source of the same fact (`X-Forwarded-Uri` after `X-Original-URI`, the peer after `X-Forwarded-For`) may be the client's.
Values are text as bytes decode to with UTF-8 and `surrogateescape`: bytes that are not UTF-8 appear as lone surrogates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from tidegate.errors import BadRequest, clip
from tidegate.policy.attributes import MAX_VALUE, AttributeSource, SourceKind

_SECRETS: Final = frozenset(("authorization", "x-api-key"))


class RequestHeaders(Protocol):
    """The headers of one request; names in lower case."""

    def get_all(self, key: str) -> list[str]:
        """Every value of a header, in order."""
        ...

    def __contains__(self, key: str) -> bool: ...


class AsgiHeaders:
    """The headers of an ASGI scope.

    Args:
        pairs: names and values as bytes.
        names: the headers to keep, in lower case.
    """

    __slots__ = ("_values",)

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]], names: frozenset[bytes]) -> None:
        values: dict[str, list[str]] = {}
        for name, value in pairs:
            # ASGI has names in lower case; some servers and test clients do not.
            lower = name.lower()
            if lower in names:
                values.setdefault(lower.decode("latin-1"), []).append(value.decode("utf-8", "surrogateescape").strip(" \t"))
        self._values = values

    def get_all(self, key: str) -> list[str]:
        """See `RequestHeaders`."""
        return self._values.get(key, [])

    def __contains__(self, key: str) -> bool:
        return key in self._values


def single(headers: RequestHeaders, name: str) -> str | None:
    """The value of a header that may come once.

    Args:
        name: in lower case.

    Returns:
        The value, ASCII only; None where the header is absent.

    Raises:
        BadRequest: if it came more than once (a gateway and a backend may read different ones) or has bytes above 0x7F.
    """
    values = headers.get_all(name)
    if len(values) == 1 and values[0].isascii():
        return values[0]
    if not values and name not in headers:
        return None
    return _unusual(name, values, may_be_unicode=False)


def single_path(headers: RequestHeaders, name: str) -> str | None:
    """The value of a header with a path: as `single`, but raw UTF-8 is accepted.

    Args:
        name: in lower case.

    Returns:
        The value; None where the header is absent.

    Raises:
        BadRequest: if it came more than once or has bytes that are not UTF-8.
    """
    values = headers.get_all(name)
    if len(values) == 1 and values[0].isascii():
        return values[0]
    if not values and name not in headers:
        return None
    return _unusual(name, values, may_be_unicode=True)


def utf8_path(path: str) -> str:
    """A path of the request line as `Check.of` reads it.

    Args:
        path: one character for each byte that came.

    Returns:
        Its text as UTF-8.

    Raises:
        BadRequest: if it has bytes that are not UTF-8.
    """
    if path.isascii():
        return path
    text = path.encode("latin-1").decode("utf-8", "surrogateescape")
    if _is_unicode(text):
        return text
    raise BadRequest(f"the path {clip(text)} has bytes that are not UTF-8: {_REMEDY}", field="path")


def joined(headers: RequestHeaders, name: str) -> str | None:
    """The value of a header whose occurrences form one list.

    Args:
        name: in lower case.

    Returns:
        All values joined with commas, ASCII only; None where the header is absent.

    Raises:
        BadRequest: if it has bytes above 0x7F.
    """
    values = headers.get_all(name)
    if not values:
        return None if name not in headers else _unusual(name, values, may_be_unicode=False)
    value = values[0] if len(values) == 1 else ",".join(values)
    return value if value.isascii() else _unusual(name, [value], may_be_unicode=False)


def read_attributes(headers: RequestHeaders, sources: Sequence[AttributeSource]) -> Mapping[str, str]:
    """The attributes that headers carry; an empty header counts as absent.

    Args:
        headers: of a request of a trusted proxy.
        sources: where it sends them.

    Raises:
        BadRequest: if one came more than once, is not ASCII or too long.
    """
    found: dict[str, str] = {}
    for source in sources:
        if source.kind is not SourceKind.HEADER:
            continue
        value = single(headers, source.key)
        if value:
            if len(value) > MAX_VALUE:
                raise BadRequest(
                    f"the {source.key} header has {len(value)} characters: at most {MAX_VALUE} are read", field=source.key
                )
            found[source.name] = value
    return found


def _unusual(name: str, values: list[str], *, may_be_unicode: bool) -> str:
    """What the fast path does not settle: no readable value, several values, a value beyond ASCII."""
    if len(values) > 1:
        raise BadRequest(f"{len(values)} {name} headers came: send one", field=name)
    if not values:
        # Some servers leave such values out and keep the name.
        raise BadRequest(f"the {name} header has bytes above 0x7F, which cannot be read: {_REMEDY}", field=name)
    value = values[0]
    if not may_be_unicode:
        shown = "" if name in _SECRETS else f" {clip(value)}"
        raise BadRequest(f"the {name} header{shown} has bytes above 0x7F: send ASCII", field=name)
    if _is_unicode(value):
        return value
    raise BadRequest(f"the {name} header {clip(value)} has bytes that are not UTF-8: {_REMEDY}", field=name)


_REMEDY: Final = "percent-encode them or leave them out"


def _is_unicode(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)
