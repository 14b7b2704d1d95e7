"""The records of `[[access]]`; `access` reads and compiles them."""

from __future__ import annotations

import enum

import msgspec


class AccessAction(enum.StrEnum):
    """What an entry of `[[access]]` does."""

    ALLOW = "allow"
    """Nothing is counted."""
    DENY = "deny"
    """The check is answered 403."""


class AccessEntry(msgspec.Struct, frozen=True, gc=False):
    """One table `[[access]]`. It names exactly one of the last four.

    Args:
        action: what it does.
        networks: canonical texts, such as `203.0.113.0/24`.
        match: names of attributes and patterns that their values must match, sorted by name.
        api_key_id: id of an API key; holds for the keys that replaced it too.
    """

    action: AccessAction
    networks: tuple[str, ...] = ()
    match: tuple[tuple[str, str], ...] = ()
    customer: str = ""
    api_key_id: str = ""
