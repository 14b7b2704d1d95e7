"""Parts of URLs that may hold a password: messages repeat only what cannot be a piece of one.

`urllib.parse.urlsplit` is not used for them: a raw '/', '?' or '#' in a password moves the rest of it into the path, the query or
the fragment, which messages then repeat, and a bracket without its other half raises `ValueError`.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]{0,30}", re.ASCII)
_POSTGRES: Final = re.compile(
    r"(?P<scheme>postgres(?:ql)?)://(?:(?P<user>[^@/]*)@)?(?P<hosts>{host}(?:,{host})*)(?P<name>/[^?@]*)?(?P<options>\?.*)?".replace(
        "{host}", r"(?:\[[^\]@/?,]*\]|[^@/?\[\]:,]*)(?::[0-9]*)?"
    ),
    re.ASCII | re.DOTALL,
)
_AFTER_COLON: Final = re.compile(r":(?!//)(?![0-9]{1,5}(?:[/,]|\Z))[^/]*", re.ASCII)
_SHOWN: Final = 100


class Parts(msgspec.Struct, frozen=True):
    """A URL in pieces, as they came.

    Args:
        user: user and password; None where there is no '@'.
        hosts: what is between '@' and the path.
        path: with its slash, or empty.
        query: without its question mark, or empty.
    """

    user: str | None
    hosts: str
    path: str
    query: str


def split_url(rest: str) -> Parts | None:
    """Take a URL apart.

    Args:
        rest: what follows `://`.

    Returns:
        The parts; None where a user or password may have a raw '/', '?' or '#', or there are control characters: nothing of it is
        to be repeated then.
    """
    if any(character < " " or character == "\x7f" for character in rest) or "#" in rest:
        return None
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    before, at, hosts = authority.rpartition("@")
    path, _, query = rest[len(authority) :].partition("?")
    if "@" in path or ("@" in query and ("=" not in query or not _are_hosts(hosts))):
        return None
    return Parts(before if at else None, hosts, path, query)


def scheme_of(url: str) -> str:
    """The scheme of a URL, empty where it has none: what is before '://' may be anything, a password among it."""
    scheme, separator, _ = url.partition("://")
    return scheme if separator and _SCHEME.fullmatch(scheme) else ""


def is_postgres_url(url: str) -> bool:
    """Whether a PostgreSQL URL has the form that libpq reads, with numbers for ports and no '@' but one."""
    return _postgres(url) is not None


def without_secrets(url: str) -> str:
    """A URL of a database as messages may show it: without user, password and options.

    Returns:
        Scheme, hosts and name; the scheme alone where the rest cannot be distinguished from a password.
    """
    if url.startswith("sqlite:///") or ("@" not in url and scheme_of(url) in ("sqlite", "")):
        return url.partition("?")[0]
    match = _postgres(url)
    if match is None:
        return f"{scheme_of(url)}://…"
    return f"{match['scheme']}://{match['hosts']}{match['name'] or ''}"


def masked(url: str) -> str:
    """A URL that should have no password, shortened, with everything hidden that could be one: after ':', '?' and '#'."""
    if "@" in url:
        return f"{scheme_of(url)}://…"
    head = re.split(r"[?#]", url, maxsplit=1)[0]
    return _AFTER_COLON.sub(":…", head)[:_SHOWN]


def _postgres(url: str) -> re.Match[str] | None:
    match = _POSTGRES.fullmatch(url)
    if match is not None and match["user"] is None and match["hosts"] and "@" in (match["options"] or ""):
        # `u:pass/word?x@host`: the '@' is the one of user and password.
        return None
    return match


def _are_hosts(hosts: str) -> bool:
    return all(re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::[0-9]+)?", each) for each in hosts.split(","))
