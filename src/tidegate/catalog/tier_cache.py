"""Tiers in the process cache (L1), and the names of all of them.

A changed tier is loaded again at once in the background, so that checks rarely wait for it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from tidegate.catalog.cache_level import CachedTier, CacheLevel, TierNames
from tidegate.catalog.changes import TIER
from tidegate.policy.matching import CompiledTier

if TYPE_CHECKING:
    from tidegate.catalog.cached import CachedCatalog

RELOADS: Final = 4
"""Maximum number of changed tiers reloaded at the same time: checks need database connections too."""
_MAX_ATTEMPTS: Final = 3


class TierCache:
    """Cached tiers. A part of `CachedCatalog`.

    Attributes:
        tiers: the entries by name.
        names: the names of all tiers, as one entry.
    """

    def __init__(self, cached: CachedCatalog) -> None:
        self.tiers: CacheLevel[CachedTier | None] = CacheLevel(TIER, 10_000)
        self.names: CacheLevel[TierNames] = CacheLevel("names", 1)
        self._cached = cached
        self._to_reload: OrderedDict[str, None] = OrderedDict()
        self._reloading: asyncio.Task[None] | None = None

    async def find(self, name: str) -> CachedTier | None:
        """A tier, or None.

        Raises:
            CatalogUnavailable: if the catalog fails and no cached entry can be served.
        """
        entry = self.tiers.entries.get(name)
        if entry is not None and entry[0] > self._cached.now():
            if entry[1] is not None:
                entry[1].recent = True
            return entry[1]
        cached = await self._cached.loader.load_through(self.tiers, name, self._load)
        entry = self.tiers.entries.get(name)
        if cached is not None and (entry is None or entry[1] is not cached):
            # It changed during the load: users of it must read the cache again.
            cached.replace()
        return cached

    async def current(self, name: str) -> CachedTier | None:
        """Like `find`, repeated if it changed during the load: others may have joined this load after the change."""
        cached = await self.find(name)
        for _ in range(_MAX_ATTEMPTS):
            if cached is None or cached.current or self._cached.failing:
                break
            cached = await self.find(name)
        return cached

    async def fresh(self, name: str) -> CachedTier | None:
        """Like `find`, but never an expired entry.

        Raises:
            CatalogUnavailable: if the catalog fails.
        """
        entry = self.tiers.entries.get(name)
        if entry is not None and entry[0] > self._cached.now():
            return entry[1]
        return await asyncio.shield(self._cached.loader.flight(self.tiers, name, self._load))

    async def is_tier(self, name: str) -> bool:
        """Whether there is a tier of this name.

        Raises:
            CatalogUnavailable: if the catalog fails and no usable entry is cached.
        """
        entry = self.names.entries.get("")
        if entry is not None and entry[0] > self._cached.now():
            return name in entry[1].names
        return name in (await self._cached.loader.load_through(self.names, "", self._load_names)).names

    def mark_replaced(self, name: str) -> None:
        """Make the users of an entry read the cache again."""
        entry = self.tiers.entries.get(name)
        if entry is not None and entry[1] is not None:
            entry[1].replace()

    def schedule_reload(self, names: Iterable[str]) -> None:
        """Reload cached tiers that changed, before a check needs them."""
        self._to_reload.update(dict.fromkeys(names))
        if self._to_reload and self._reloading is None:
            self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        try:
            while self._to_reload:
                names = [self._to_reload.popitem(last=False)[0] for _ in range(min(RELOADS, len(self._to_reload)))]
                # A tier whose load fails is loaded by the next check that needs it.
                await asyncio.wait([self._cached.loader.flight(self.tiers, name, self._load) for name in names])
        finally:
            self._reloading = None

    async def _load(self, name: str) -> CachedTier | None:
        _, tier = await self._cached.catalog.tier(name, self._cached.min_version(TIER, name))
        # Users of the previous entry must read the cache again.
        self.mark_replaced(name)
        return None if tier is None else CachedTier(CompiledTier(tier))

    async def _load_names(self, _: str) -> TierNames:
        return TierNames(frozenset(await self._cached.catalog.tier_names()))
