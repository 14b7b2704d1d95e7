"""What the cache in front of the catalog holds: tiers ready to be used, callers, and a bounded table of either."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final, Generic, TypeVar

from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import ApiKey, KeyStatus

SECOND_CHANCES: Final = 16
"""So many entries get a second round for each that goes: where all are in use, no check waits until all were looked at."""

V = TypeVar("V", bound="HeldTier | Caller | None")


class HeldTier:
    """A tier as it is cached, and whether it still is."""

    __slots__ = ("compiled", "current", "recent")

    def __init__(self, compiled: CompiledTier) -> None:
        self.compiled = compiled
        self.current = True
        self.recent = False


class Caller:
    """Who asks, as far as the catalog knows.

    Args:
        api_key: the key's record; None for callers without a key.
        held: the tier's rules.

    Attributes:
        form_checked: whether a key came that has the form of keys; look-ups by the digest alone do not tell.
        never_ends: whether the key is active and does not expire, or there is none.
    """

    __slots__ = ("api_key", "form_checked", "held", "never_ends", "recent", "subject", "tier")

    def __init__(self, api_key: ApiKey | None, held: HeldTier) -> None:
        self.api_key = api_key
        self.held = held
        self.recent = False
        self.form_checked = False
        self.never_ends = api_key is None or (api_key.status is KeyStatus.ACTIVE and api_key.expires_at_us is None)
        # The tier's rules, with the key's own limits where it has any.
        self.tier = (
            held.compiled if api_key is None or not api_key.overrides else CompiledTier(held.compiled.tier, api_key.overrides)
        )
        self.subject = "" if api_key is None else f"k:{api_key.owner}"


class CacheLevel(Generic[V]):
    """A bounded cache of one kind of thing, with single flight.

    The oldest entry goes first, but one that was asked for since it came there gets a second round (CLOCK; Corbató 1968): about
    as good as the least recently used, for the price of one flag where a hit would else move the entry.

    `stale` holds entries that may be out of date, which are served only while the catalog fails.
    """

    def __init__(self, kind: str, max_entries: int) -> None:
        self.kind = kind
        self.max_entries = max_entries
        # Not a dict, in which the first entry is found ever more slowly the more were taken off the front.
        self.entries: OrderedDict[str, tuple[float, V]] = OrderedDict()
        self.stale: OrderedDict[str, tuple[float, V]] = OrderedDict()
        self.flights: dict[str, asyncio.Task[V]] = {}

    def put(self, name: str, value: V, fresh_until: float) -> None:
        """Keep an entry, in place of the oldest one where there are too many."""
        self.entries.pop(name, None)
        if self.stale:
            self.stale.pop(name, None)
        chances = SECOND_CHANCES
        while len(self.entries) >= self.max_entries:
            oldest, entry = self.entries.popitem(last=False)
            if chances and entry[1] is not None and entry[1].recent:
                chances -= 1
                entry[1].recent = False
                self.entries[oldest] = entry
        self.entries[name] = (fresh_until, value)

    def mark_stale(self, name: str) -> None:
        """Serve an entry no more unless the catalog fails."""
        entry = self.entries.pop(name, None)
        if entry is not None:
            self.stale[name] = entry
            self._bound_stale()
        self.flights.pop(name, None)

    def mark_all_stale(self) -> None:
        """Serve no entry more unless the catalog fails."""
        self.stale.update(self.entries)
        self.entries = OrderedDict()
        self.flights.clear()
        self._bound_stale()

    def drop(self, name: str) -> None:
        """Serve an entry never again."""
        self.entries.pop(name, None)
        self.stale.pop(name, None)
        self.flights.pop(name, None)

    def _bound_stale(self) -> None:
        while len(self.stale) > self.max_entries:
            self.stale.popitem(last=False)
