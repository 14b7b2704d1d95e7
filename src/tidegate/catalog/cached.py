"""The catalog in memory: what the gate asks. One level of cache in front of any `Catalog`.

What is cached is a whole compiled tier and a single API key, never a (key, path) pair, so paths grow nothing; keys are bounded by
`max_keys`, unknown keys by `MAX_UNKNOWN` and remembered for seconds only. Concurrent misses of one key or tier make one
query; how many queries run at once is bounded by the database's pool. When the catalog fails, what is cached serves up to
`stale_if_error_s` past its time.

A change of the catalog takes away what it touched and nothing else: one revoked key of a hundred thousand makes one query. A
key that is known to be changed is never served again as it was; a changed tier is, while the catalog fails, for an old limit is
better than none.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Generic, TypeVar

from tidegate.catalog import Catalog
from tidegate.catalog.changes import ALL, ANONYMOUS, KEY, TIER, Changes, Item, LastChanges
from tidegate.errors import CatalogUnavailable
from tidegate.matching import CompiledTier
from tidegate.policy import ApiKey

logger = logging.getLogger(__name__)

MAX_UNKNOWN: Final = 10_000
UNKNOWN_TTL_S: Final = 5.0
SECOND_CHANCES: Final = 16
"""So many entries get a second round for each that goes: where all are in use, no check waits until all were looked at."""
PATIENCE_S: Final = 0.05
"""So long a check waits for the catalog where an entry past its time can stand in; the query goes on meanwhile."""
RETRY_S: Final = 1.0
"""So long nothing past its time is asked for again after the catalog failed, and waited for after it was slow."""

_V = TypeVar("_V", bound="_HeldTier | Caller | None")


class _HeldTier:
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
    """

    __slots__ = ("api_key", "held", "recent", "subject", "tier")

    def __init__(self, api_key: ApiKey | None, held: _HeldTier) -> None:
        self.api_key = api_key
        self.held = held
        self.recent = False
        # The tier's rules, with the key's own limits where it has any.
        self.tier = (
            held.compiled if api_key is None or not api_key.overrides else CompiledTier(held.compiled.tier, api_key.overrides)
        )
        self.subject = "" if api_key is None else f"k:{api_key.id}"


class _Shelf(Generic[_V]):
    """A bounded cache of one kind of thing, with single flight.

    The oldest entry goes first, but one that was asked for since it came there gets a second round (CLOCK; Corbató 1968): about
    as good as the least recently used, for the price of one flag where a hit would else move the entry.

    `past` holds what may be out of date and serves only while the catalog fails.
    """

    def __init__(self, kind: str, most: int) -> None:
        self.kind = kind
        self.most = most
        # Not a dict, in which the first entry is found ever more slowly the more were taken off the front.
        self.entries: OrderedDict[str, tuple[float, _V]] = OrderedDict()
        self.past: dict[str, tuple[float, _V]] = {}
        self.flights: dict[str, asyncio.Task[_V]] = {}

    def put(self, name: str, value: _V, fresh_until: float) -> None:
        self.entries.pop(name, None)
        if self.past:
            self.past.pop(name, None)
        chances = SECOND_CHANCES
        while len(self.entries) >= self.most:
            oldest, entry = self.entries.popitem(last=False)
            if chances and entry[1] is not None and entry[1].recent:
                chances -= 1
                entry[1].recent = False
                self.entries[oldest] = entry
        self.entries[name] = (fresh_until, value)

    def doubt(self, name: str) -> None:
        """Serve an entry no more unless the catalog fails."""
        entry = self.entries.pop(name, None)
        if entry is not None:
            self.past[name] = entry
        self.flights.pop(name, None)

    def doubt_all(self) -> None:
        """Serve no entry more unless the catalog fails."""
        self.past.update(self.entries)
        self.entries = OrderedDict()
        self.flights.clear()
        for name in list(itertools.islice(self.past, max(0, len(self.past) - self.most))):
            del self.past[name]

    def drop(self, name: str) -> None:
        """Serve an entry never again."""
        self.entries.pop(name, None)
        self.past.pop(name, None)
        self.flights.pop(name, None)


class CachedCatalog:
    """What the gate asks about callers.

    Args:
        catalog: where policy lives.
        l1_ttl_s: how long an entry is fresh, s, give or take a tenth so that entries do not expire together.
        stale_if_error_s: how long past that it still serves while the catalog fails, s.
        max_keys: most API keys cached, 1 or more; each costs about 700 bytes.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        catalog: Catalog,
        l1_ttl_s: float = 60.0,
        stale_if_error_s: float = 3600.0,
        max_keys: int = 100_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog = catalog
        self.hits = self.misses = self.stale = 0
        self._l1_ttl_s = l1_ttl_s
        self._stale_if_error_s = stale_if_error_s
        self._clock = clock
        self._callers: _Shelf[Caller | None] = _Shelf(KEY, max_keys)
        self._unknown: dict[str, float] = {}
        self._tiers: _Shelf[_HeldTier | None] = _Shelf(TIER, 10_000)
        self._anonymous: _Shelf[Caller | None] = _Shelf(ANONYMOUS, 1)
        self._generation = 0
        self._retry_at = self._slow_until = -math.inf
        self._last = LastChanges()

    @property
    def version(self) -> int:
        """The version of the catalog that is in force here, as far as `changed` was told."""
        return self._last.version

    async def caller(self, sha256: str) -> Caller | None:
        """The caller that an API key belongs to.

        Args:
            sha256: lower-case hex digest of the key.

        Returns:
            The caller, with revoked and expired keys too; None where the key is unknown. Costs 0.2 µs when cached.

        Raises:
            CatalogUnavailable: if the catalog fails and nothing cached can stand in.
        """
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and (caller := entry[1]) is not None and caller.held.current:
            self.hits += 1
            caller.recent = True
            return caller
        until = self._unknown.get(sha256)
        if until is not None:
            if until > self._clock():
                self.hits += 1
                return None
            self._unknown.pop(sha256, None)
        return await self._through(self._callers, sha256, self._load_caller)

    async def anonymous(self) -> Caller | None:
        """The caller that checks without a key belong to.

        Returns:
            The caller; None where such checks are refused.

        Raises:
            CatalogUnavailable: if the catalog fails and nothing cached can stand in.
        """
        entry = self._anonymous.entries.get("")
        if entry is not None and entry[0] > self._clock() and (entry[1] is None or entry[1].held.current):
            self.hits += 1
            return entry[1]
        return await self._through(self._anonymous, "", self._load_anonymous)

    async def tier(self, name: str) -> CompiledTier | None:
        """A tier ready to be asked.

        Args:
            name: the tier's name.

        Returns:
            The tier; None where it is unknown.

        Raises:
            CatalogUnavailable: if the catalog fails and nothing cached can stand in.
        """
        held = await self._tier(name)
        return None if held is None else held.compiled

    async def fresh_tier(self, name: str) -> CompiledTier | None:
        """As `tier`, but nothing past its time stands in: for those who changed it, and can wait.

        Args:
            name: the tier's name.

        Returns:
            The tier; None where it is unknown.

        Raises:
            CatalogUnavailable: if the catalog fails.
        """
        entry = self._tiers.entries.get(name)
        fresh = entry is not None and entry[0] > self._clock()
        held = entry[1] if entry is not None and fresh else await asyncio.shield(self._flight(self._tiers, name, self._load_tier))
        return None if held is None else held.compiled

    async def tier_names(self) -> list[str]:
        """All tiers there are. Not cached: no check asks for them.

        Returns:
            Their names, sorted.

        Raises:
            CatalogUnavailable: if the catalog fails.
        """
        return await self.catalog.tier_names()

    def changed(self, changes: Changes) -> None:
        """Forget what was touched, or everything where that is not known. What is being loaded meanwhile is not kept.

        Args:
            changes: since `version`.
        """
        everything = changes.version < self.version or changes.floor > self.version
        self._last.note(changes)
        if everything:
            self.invalidate()
        self._forget(item for _, item in changes.items)

    def touched(self, version: int, items: Iterable[Item]) -> None:
        """Forget what a change touched that was made here, without waiting to read of it.

        Args:
            version: that the change made.
            items: what it touched.
        """
        items = list(items)
        self._last.remember((version, item) for item in items)
        if (ALL, "") in items:
            self.invalidate()
        self._forget(items)

    def invalidate(self) -> None:
        """Ask the catalog again about everything. What is being loaded meanwhile is not kept."""
        self._generation += 1
        for shelf in (self._callers, self._tiers, self._anonymous):
            shelf.doubt_all()
        self._unknown.clear()

    def _forget(self, items: Iterable[Item]) -> None:
        for kind, name in items:
            if kind == KEY:
                self._callers.drop(name)
                self._unknown.pop(name, None)
            elif kind == TIER:
                self._out_of_date(name)
                self._tiers.doubt(name)
            elif kind == ANONYMOUS:
                self._anonymous.doubt("")

    def _out_of_date(self, tier: str) -> None:
        entry = self._tiers.entries.get(tier)
        if entry is not None and entry[1] is not None:
            entry[1].current = False

    def __len__(self) -> int:
        """API keys cached, unknown ones included."""
        return len(self._callers.entries) + len(self._unknown)

    async def _through(self, shelf: _Shelf[_V], name: str, load: Callable[[str], Awaitable[_V]]) -> _V:
        self.misses += 1
        now = self._clock()
        entry = shelf.entries.get(name) or shelf.past.get(name)
        if entry is None or entry[0] + self._stale_if_error_s <= now:
            return await asyncio.shield(self._flight(shelf, name, load))
        if now >= self._retry_at:
            flight = self._flight(shelf, name, load)
            if now >= self._slow_until:
                # Not asyncio.timeout: it needs a task of its own, and the HTTP server begins without one.
                await asyncio.wait((flight,), timeout=PATIENCE_S)
                if not flight.done():
                    self._slow_until = now + RETRY_S
                else:
                    try:
                        return flight.result()
                    except CatalogUnavailable as error:
                        logger.debug("an entry past its time stands in: %s", error)
        self.stale += 1
        return entry[1]

    def _flight(self, shelf: _Shelf[_V], name: str, load: Callable[[str], Awaitable[_V]]) -> asyncio.Task[_V]:
        """One query for all who ask for it meanwhile; none of them can cancel it for the others."""
        task = shelf.flights.get(name)
        if task is None:
            task = shelf.flights[name] = asyncio.ensure_future(self._load(shelf, name, load))

            def landed(done: asyncio.Task[_V]) -> None:
                if shelf.flights.get(name) is done:
                    del shelf.flights[name]
                # Looked at here, for every waiter may have gone before it failed.
                if not done.cancelled() and isinstance(done.exception(), CatalogUnavailable):
                    self._retry_at = self._clock() + RETRY_S

            task.add_done_callback(landed)
        return task

    async def _load(self, shelf: _Shelf[_V], name: str, load: Callable[[str], Awaitable[_V]]) -> _V:
        generation, needed = self._generation, self._last.needed(shelf.kind, name)
        value = await load(name)
        if generation == self._generation and needed == self._last.needed(shelf.kind, name):
            if value is None and shelf.kind == KEY:
                # Apart from the known ones, so that a flood of unknown keys cannot push those out.
                shelf.drop(name)
                if len(self._unknown) >= MAX_UNKNOWN:
                    del self._unknown[next(iter(self._unknown))]
                self._unknown[name] = self._clock() + UNKNOWN_TTL_S
            else:
                shelf.put(name, value, self._fresh_until(shelf, name, value))
        return value

    def _fresh_until(self, shelf: _Shelf[_V], name: str, value: _V) -> float:
        now = self._clock()
        entry = shelf.entries.get(name)
        if entry is not None and entry[0] > now and _of_one_key(value, entry[1]):
            # Only its tier was asked for: the key is as old as it was.
            return entry[0]
        return now + self._l1_ttl_s * random.uniform(0.9, 1.1)

    async def _tier(self, name: str) -> _HeldTier | None:
        entry = self._tiers.entries.get(name)
        if entry is not None and entry[0] > self._clock():
            if entry[1] is not None:
                entry[1].recent = True
            return entry[1]
        held = await self._through(self._tiers, name, self._load_tier)
        entry = self._tiers.entries.get(name)
        if held is not None and (entry is None or entry[1] is not held):
            # It was changed on the way: whoever holds it looks here again.
            held.current = False
        return held

    async def _load_caller(self, sha256: str) -> Caller | None:
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and entry[1] is not None:
            # Only its tier is out of date.
            api_key = entry[1].api_key
        else:
            api_key = await self.catalog.api_key(sha256, self._last.needed(KEY, sha256))
        if api_key is None:
            return None
        held = await self._tier(api_key.tier)
        if held is None:
            raise CatalogUnavailable(f"the catalog knows the key {api_key.id} but not its tier {api_key.tier!r}: try again")
        return Caller(api_key, held)

    async def _load_tier(self, name: str) -> _HeldTier | None:
        tier = await self.catalog.tier(name, self._last.needed(TIER, name))
        # Whoever holds what was cached before looks here again.
        self._out_of_date(name)
        return None if tier is None else _HeldTier(CompiledTier(tier))

    async def _load_anonymous(self, _: str) -> Caller | None:
        name = await self.catalog.anonymous_tier(self._last.needed(ANONYMOUS))
        if name is None:
            return None
        held = await self._tier(name)
        return None if held is None else Caller(None, held)


def _of_one_key(one: object, other: object) -> bool:
    return isinstance(one, Caller) and isinstance(other, Caller) and one.api_key is not None and one.api_key is other.api_key
