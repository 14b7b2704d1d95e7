"""The catalog in memory: what the gate asks. One level of cache in front of any `Catalog`.

What is cached is a whole compiled tier and a single API key, never a (key, path) pair, so paths grow nothing; keys are bounded by
`max_keys`, unknown keys by `MAX_UNKNOWN` and remembered for seconds only. Concurrent misses of one key or tier make one
query, and at most `MAX_QUERIES` queries run at once. When the catalog fails, what is cached serves up to `stale_if_error_s`
past its time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from tidegate.catalog import Catalog
from tidegate.errors import CatalogUnavailable
from tidegate.matching import CompiledTier
from tidegate.policy import ApiKey

MAX_UNKNOWN: Final = 10_000
MAX_QUERIES: Final = 16
UNKNOWN_TTL_S: Final = 5.0

_V = TypeVar("_V")


class Caller:
    """Who asks, as far as the catalog knows.

    Args:
        api_key: the key's record; None for callers without a key.
        tier: the tier's rules, with the key's own limits where it has any.
    """

    __slots__ = ("api_key", "subject", "tier")

    def __init__(self, api_key: ApiKey | None, tier: CompiledTier) -> None:
        self.api_key = api_key
        self.tier = tier
        self.subject = "" if api_key is None else f"k:{api_key.id}"


class _Shelf(Generic[_V]):
    """A bounded cache of one kind of thing, with single flight. The oldest entries go first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.entries: dict[str, tuple[float, _V]] = {}
        self.flights: dict[str, asyncio.Task[_V]] = {}

    def put(self, name: str, value: _V, fresh_until: float) -> None:
        self.entries.pop(name, None)
        if len(self.entries) >= self.most:
            del self.entries[next(iter(self.entries))]
        self.entries[name] = (fresh_until, value)

    async def fly(self, name: str, load: Callable[[str], Awaitable[_V]]) -> _V:
        """Load a value once for all who ask for it meanwhile; none of them can cancel it for the others."""
        task = self.flights.get(name)
        if task is None:
            task = self.flights[name] = asyncio.ensure_future(_awaited(load, name))
            task.add_done_callback(lambda done: self._landed(name, done))
        return await asyncio.shield(task)

    def _landed(self, name: str, done: asyncio.Task[_V]) -> None:
        if self.flights.get(name) is done:
            del self.flights[name]
        if not done.cancelled():
            done.exception()  # marks it as seen: every waiter may have gone before it failed


async def _awaited(load: Callable[[str], Awaitable[_V]], name: str) -> _V:
    return await load(name)


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
        self._callers: _Shelf[Caller | None] = _Shelf(max_keys)
        self._unknown: dict[str, float] = {}
        self._tiers: _Shelf[CompiledTier | None] = _Shelf(10_000)
        self._anonymous: _Shelf[Caller | None] = _Shelf(1)
        self._queries = asyncio.Semaphore(MAX_QUERIES)
        self._generation = 0

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
        if entry is not None and entry[0] > self._clock():
            self.hits += 1
            return entry[1]
        until = self._unknown.get(sha256)
        if until is not None:
            if until > self._clock():
                self.hits += 1
                return None
            self._unknown.pop(sha256, None)
        found = await self._through(self._callers, sha256, self._load_caller)
        if found is None:
            # Apart from the known ones, so that a flood of unknown keys cannot push those out.
            self._callers.entries.pop(sha256, None)
            if len(self._unknown) >= MAX_UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
            self._unknown[sha256] = self._clock() + UNKNOWN_TTL_S
        return found

    async def anonymous(self) -> Caller | None:
        """The caller that checks without a key belong to.

        Returns:
            The caller; None where such checks are refused.

        Raises:
            CatalogUnavailable: if the catalog fails and nothing cached can stand in.
        """
        entry = self._anonymous.entries.get("")
        if entry is not None and entry[0] > self._clock():
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
        entry = self._tiers.entries.get(name)
        if entry is not None and entry[0] > self._clock():
            return entry[1]
        return await self._through(self._tiers, name, self._load_tier)

    async def tier_names(self) -> list[str]:
        """All tiers there are. Not cached: no check asks for them.

        Returns:
            Their names, sorted.

        Raises:
            CatalogUnavailable: if the catalog fails.
        """
        async with self._queries:
            return await self.catalog.tier_names()

    def invalidate(self) -> None:
        """Forget everything that is cached. What is being loaded meanwhile is not kept."""
        self._generation += 1
        for shelf in (self._callers, self._tiers, self._anonymous):
            shelf.entries.clear()
            shelf.flights.clear()
        self._unknown.clear()

    def __len__(self) -> int:
        """API keys cached, unknown ones included."""
        return len(self._callers.entries) + len(self._unknown)

    async def _through(self, shelf: _Shelf[_V], name: str, load: Callable[[str], Awaitable[_V]]) -> _V:
        self.misses += 1
        generation = self._generation
        try:
            value = await shelf.fly(name, load)
        except CatalogUnavailable:
            entry = shelf.entries.get(name)
            if entry is None or entry[0] + self._stale_if_error_s <= self._clock():
                raise
            self.stale += 1
            return entry[1]
        if generation == self._generation:
            shelf.put(name, value, self._clock() + self._l1_ttl_s * random.uniform(0.9, 1.1))
        return value

    async def _load_caller(self, sha256: str) -> Caller | None:
        async with self._queries:
            api_key = await self.catalog.api_key(sha256)
        if api_key is None:
            return None
        tier = await self.tier(api_key.tier)
        if tier is None:
            raise CatalogUnavailable(f"the catalog knows the key {api_key.id} but not its tier {api_key.tier!r}: try again")
        return Caller(api_key, CompiledTier(tier.tier, api_key.overrides) if api_key.overrides else tier)

    async def _load_tier(self, name: str) -> CompiledTier | None:
        async with self._queries:
            tier = await self.catalog.tier(name)
        return None if tier is None else CompiledTier(tier)

    async def _load_anonymous(self, _: str) -> Caller | None:
        async with self._queries:
            name = await self.catalog.anonymous_tier()
        if name is None:
            return None
        tier = await self.tier(name)
        return None if tier is None else Caller(None, tier)
