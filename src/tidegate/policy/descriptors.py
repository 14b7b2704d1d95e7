"""Descriptors as Envoy has them, entries of a key and a value: how a rule names them, and how they are counted.

In a policy file a rule has `descriptor = { service = "pay", user = "*" }` in place of an endpoint. Everywhere else that stands as
its endpoint, `descriptor:service=pay&user=*`: no path begins so, and what knows of endpoints need not know of descriptors.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tidegate.errors import PolicyError
from tidegate.policy.fields import short

PREFIX: Final = "descriptor:"
MAX_ENTRIES: Final = 16
MAX_SUBJECT: Final = 128

_SIGNS: Final = re.compile(r"[%&=#]")
_ESCAPED: Final = re.compile(r"%([0-9A-F]{2})")

Entries = Sequence[tuple[str, str]]


def descriptor_text(entries: Mapping[object, object]) -> str:
    """The endpoint text of a descriptor.

    Args:
        entries: keys and values; `*` in a value matches any run of characters.

    Returns:
        `descriptor:key=value&…`, sorted by key.

    Raises:
        PolicyError: naming what is wrong and the remedy.
    """
    if not entries or len(entries) > MAX_ENTRIES:
        raise PolicyError(f'descriptor has {len(entries)} entries: it takes 1 to {MAX_ENTRIES}, such as {{ user = "*" }}')
    for key, value in entries.items():
        for what, text in (("key", key), ("value", value)):
            if not isinstance(text, str) or not 1 <= len(text) <= 256 or not text.isprintable():
                raise PolicyError(f"descriptor has the {what} {short(text)}: it must be 1 to 256 printable characters, in quotes")
    return PREFIX + entries_text(sorted((str(key), str(value)) for key, value in entries.items()))


def descriptor_entries(endpoint: str) -> tuple[tuple[str, str], ...]:
    """The descriptor of an endpoint text.

    Args:
        endpoint: of a valid rule.

    Returns:
        Keys and values; none where it is a path.
    """
    if not endpoint.startswith(PREFIX):
        return ()
    pairs = (part.partition("=") for part in endpoint.removeprefix(PREFIX).split("&"))
    return tuple((unescaped(key), unescaped(value)) for key, _, value in pairs)


def canonical_descriptor(endpoint: str) -> str:
    """Validate the endpoint text of a descriptor.

    Args:
        endpoint: `descriptor:key=value&…`.

    Returns:
        The same, sorted by key.

    Raises:
        PolicyError: naming what is wrong and the remedy.
    """
    entries = descriptor_entries(endpoint)
    if len(dict(entries)) < len(entries):
        raise PolicyError(f"endpoint {short(endpoint)} has a key twice: keep the one meant")
    return descriptor_text(dict(entries))


def entries_text(entries: Iterable[tuple[str, str]]) -> str:
    """Entries as one text, so that no two lists of entries share one.

    Args:
        entries: keys and values.

    Returns:
        `key=value&…`, with `%`, `&`, `=` and `#` of their own escaped.
    """
    return "&".join(f"{escaped(key)}={escaped(value)}" for key, value in entries)


def entries_subject(entries: Entries, key_id: str = "", prefix: str = "d:") -> str:
    """Whom a counter counts: the entries, and an API key where each counts for itself.

    Args:
        entries: keys and values, with lone surrogates where they were no UTF-8.
        key_id: of the API key; empty where it does not matter.
        prefix: keeps the subjects of descriptors and of attributes apart.

    Returns:
        The subject: a digest where it would be long, or no text to show.
    """
    return subject_of_text(prefix + entries_text(entries) + (f"#{key_id}" if key_id else ""))


def subject_of_text(text: str) -> str:
    """A subject as it is, or its digest where it is long or does not print."""
    if len(text) <= MAX_SUBJECT and text.isprintable():
        return text
    return "h:" + hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=32).hexdigest()


def escaped(text: str) -> str:
    """A key or value without signs of its own that have a meaning in `entries_text`."""
    return _SIGNS.sub(lambda found: f"%{ord(found.group()):02X}", text)


def unescaped(text: str) -> str:
    """A key or value as it was before `entries_text` escaped it."""
    return _ESCAPED.sub(lambda found: chr(int(found.group(1), 16)), text)
