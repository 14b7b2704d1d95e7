"""The catalog in memory: what the gate asks. One level of cache in front of any `Catalog`.

What is cached is a whole compiled tier and a single API key, never a (key, path) pair, so paths grow nothing; keys are bounded by
`max_keys`, unknown keys by `MAX_UNKNOWN` and remembered for seconds only. Concurrent misses of one key or tier make one
query; how many queries run at once is bounded by the database's pool. When the catalog fails, what is cached serves up to
`stale_if_error_s` past its time.

A change of the catalog takes away what it touched and nothing else: one revoked key of a hundred thousand makes one query. A
key that is known to be changed is never served again as it was; a changed tier is, while the catalog fails, for an old limit is
better than none. While the catalog answers, it is waited for: what is known to be replaced decides nothing any more, however slow
the database is. Tiers that changed are loaded again at once, in the background, so that checks need not wait as a rule.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from tidegate.catalog import Catalog
from tidegate.catalog.cache_level import CacheLevel, Caller, HeldTier, V
from tidegate.catalog.caller_tokens import CallerTokens
from tidegate.catalog.changes import (
    ALL,
    ANONYMOUS,
    KEY,
    TIER,
    Changes,
    Item,
)
from tidegate.catalog.freshness import FreshnessTracker
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.errors import CatalogUnavailable, TooManyUnknownKeys
from tidegate.policy.matching import CompiledTier

logger = logging.getLogger(__name__)

MAX_UNKNOWN: Final = 10_000
UNKNOWN_TTL_S: Final = 5.0
PATIENCE_S: Final = 0.05
"""So long a check waits for the catalog where an entry past its time can serve; the query goes on meanwhile."""
_TRIES: Final = 3
RELOADS: Final = 4
"""So many changed tiers are loaded at the same time: checks need connections to the database too."""
RETRY_S: Final = 1.0
"""So long nothing past its time is asked for again after the catalog failed, and waited for after it was slow."""


class CachedCatalog:
    """What the gate asks about callers.

    Args:
        catalog: where policy lives.
        l1_ttl_s: how long an entry is fresh, s, give or take a tenth so that entries do not expire together.
        stale_if_error_s: how long past that it still serves while the catalog fails, s.
        max_keys: most API keys cached, 1 or more; each costs about 700 bytes.
        clock: gives monotonic seconds.
        unknown_keys: bounds the look-ups of unknown keys by client; None for no bound.

    Attributes:
        caller_tokens: is passed each change as well; None where callers of the data plane need no token.
    """

    def __init__(
        self,
        catalog: Catalog,
        l1_ttl_s: float = 60.0,
        stale_if_error_s: float = 3600.0,
        max_keys: int = 100_000,
        clock: Callable[[], float] = time.monotonic,
        unknown_keys: UnknownKeyLimit | None = None,
    ) -> None:
        self.catalog = catalog
        self.unknown_keys = unknown_keys
        self.caller_tokens: CallerTokens | None = None
        self.hits = self.misses = self.stale = 0
        self._l1_ttl_s = l1_ttl_s
        self._stale_if_error_s = stale_if_error_s
        self._clock = clock
        self._callers: CacheLevel[Caller | None] = CacheLevel(KEY, max_keys)
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._tiers: CacheLevel[HeldTier | None] = CacheLevel(TIER, 10_000)
        self._anonymous: CacheLevel[Caller | None] = CacheLevel(ANONYMOUS, 1)
        self._generation = 0
        self._retry_at = self._slow_until = -math.inf
        self._last = FreshnessTracker()
        self._failing = self._followed = False
        self._to_reload: OrderedDict[str, None] = OrderedDict()
        self._reloading: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """The version of the catalog that is in force here, as far as `changed` was told."""
        return self._last.version

    def is_at_hand(self, sha256: str) -> bool:
        """Whether `caller` answers from memory.

        Args:
            sha256: lower-case hex digest of the key.
        """
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and entry[1] is not None and entry[1].held.current:
            return True
        return self._unknown.get(sha256, 0.0) > self._clock()

    def cached_caller(self, sha256: str) -> Caller | None:
        """The caller that an API key belongs to, where memory alone knows it.

        Args:
            sha256: lower-case hex digest of the key.

        Returns:
            The caller, with revoked and expired keys too; None where `caller` has more to do.
        """
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and (caller := entry[1]) is not None and caller.held.current:
            self.hits += 1
            caller.recent = True
            return caller
        return None

    def cached_anonymous(self) -> Caller | None:
        """The caller that checks without a key belong to, where memory alone knows it.

        Returns:
            The caller; None where `anonymous` has more to do, or there is none.
        """
        entry = self._anonymous.entries.get("")
        if entry is not None and entry[0] > self._clock() and (caller := entry[1]) is not None and caller.held.current:
            self.hits += 1
            return caller
        return None

    async def caller(self, sha256: str, client: str | None = None) -> Caller | None:
        """The caller that an API key belongs to.

        Args:
            sha256: lower-case hex digest of the key.
            client: address of whoever sent the key, as `client_of` gives it; None where it is not known, or does not matter.

        Returns:
            The caller, with revoked and expired keys too; None where the key is unknown. Costs 0.2 µs when cached.

        Raises:
            CatalogUnavailable: if the catalog fails and nothing cached can stand in.
            TooManyUnknownKeys: if the key is not cached, and the client has sent too many unknown ones.
        """
        caller = self.cached_caller(sha256)
        if caller is not None:
            return caller
        until = self._unknown.get(sha256)
        if until is not None:
            if until > self._clock():
                self.hits += 1
                return None
            self._unknown.pop(sha256, None)
        if client is None or self.unknown_keys is None or sha256 in self._callers.flights:
            return await self._load_through(self._callers, sha256, self._load_caller)
        return await self._load_limited(sha256, client, self.unknown_keys)

    async def _load_limited(self, sha256: str, client: str, limit: UnknownKeyLimit) -> Caller | None:
        """A look-up that nobody else has under way, within the client's bound. A key that was known before has no bound."""
        if sha256 not in self._callers.entries and sha256 not in self._callers.stale:
            wait_s = limit.wait_s(client)
            if wait_s > 0:
                limit.refused += 1
                raise TooManyUnknownKeys(
                    f"this address has sent too many unknown API keys: try again in {math.ceil(wait_s)} s",
                    retry_after=math.ceil(wait_s),
                )
        found = await self._load_through(self._callers, sha256, self._load_caller)
        if found is None:
            limit.count(client)
        return found

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
        return await self._load_through(self._anonymous, "", self._load_anonymous)

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
        items = [item for _, item in changes.items]
        self._forget(items)
        if self.caller_tokens is not None:
            self.caller_tokens.changed(items, everything=everything)

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
        if self.caller_tokens is not None:
            self.caller_tokens.changed(items)

    def followed(self, *, failing: bool) -> None:
        """Note whether the catalog answers: who follows it queries the database itself, and not a cache.

        Args:
            failing: whether it did not answer just now.
        """
        self._followed = True
        self._failing = failing

    def invalidate(self) -> None:
        """Ask the catalog again about everything. What is being loaded meanwhile is not kept."""
        self._generation += 1
        tiers = list(self._tiers.entries)
        for level in (self._callers, self._tiers, self._anonymous):
            level.mark_all_stale()
        self._unknown.clear()
        self._schedule_reload(tiers)

    def _forget(self, items: Iterable[Item]) -> None:
        for kind, name in items:
            if kind == KEY:
                self._callers.drop(name)
                self._unknown.pop(name, None)
            elif kind == TIER:
                self._mark_tier_replaced(name)
                self._tiers.mark_stale(name)
                if name in self._tiers.stale:
                    self._schedule_reload([name])
            elif kind == ANONYMOUS:
                self._anonymous.mark_stale("")

    def _mark_tier_replaced(self, tier: str) -> None:
        entry = self._tiers.entries.get(tier)
        if entry is not None and entry[1] is not None:
            entry[1].current = False

    def _schedule_reload(self, tiers: Iterable[str]) -> None:
        """Load tiers that were cached and have changed, before a check needs them."""
        self._to_reload.update(dict.fromkeys(tiers))
        if self._to_reload and self._reloading is None:
            self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        try:
            while self._to_reload:
                names = [self._to_reload.popitem(last=False)[0] for _ in range(min(RELOADS, len(self._to_reload)))]
                # What fails is loaded by the next check that needs it.
                await asyncio.wait([self._flight(self._tiers, name, self._load_tier) for name in names])
        finally:
            self._reloading = None

    def __len__(self) -> int:
        """API keys cached, unknown ones included."""
        return len(self._callers.entries) + len(self._unknown)

    async def _load_through(self, level: CacheLevel[V], name: str, load: Callable[[str], Awaitable[V]]) -> V:
        self.misses += 1
        now = self._clock()
        entry = level.entries.get(name) or level.stale.get(name)
        if entry is None or entry[0] + self._stale_if_error_s <= now:
            return await asyncio.shield(self._flight(level, name, load))
        replaced, value = self._stale_value(level, name, entry[1])
        if now >= self._retry_at:
            flight = self._flight(level, name, load)
            try:
                if replaced and not self._failing:
                    return await asyncio.shield(flight)
                if now >= self._slow_until:
                    # Not asyncio.timeout: it needs a task of its own, and the HTTP server begins without one.
                    await asyncio.wait((flight,), timeout=PATIENCE_S)
                    if flight.done():
                        return flight.result()
                    self._slow_until = now + RETRY_S
            except CatalogUnavailable as error:
                logger.debug("an entry past its time serves: %s", error)
        self.stale += 1
        return value

    def _stale_value(self, level: CacheLevel[V], name: str, value: V) -> tuple[bool, V]:
        """Whether an entry is known to be replaced, or may be, and what it serves as where the catalog gives no newer one."""
        if name not in level.entries:
            return True, value
        if isinstance(value, Caller) and not value.held.current:
            # Its tier is another one now, whether it has changed or was merely loaded again: the key itself is as it was.
            held = self._tiers.entries.get(value.held.compiled.tier.name)
            if held is None or held[1] is None or not held[1].current:
                return True, value
            return False, Caller(value.api_key, held[1])  # type: ignore[return-value]
        return False, value

    def _flight(self, level: CacheLevel[V], name: str, load: Callable[[str], Awaitable[V]]) -> asyncio.Task[V]:
        """One query for all who ask for it meanwhile; none of them can cancel it for the others."""
        task = level.flights.get(name)
        # One of an event loop that ended meanwhile never lands.
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = level.flights[name] = asyncio.ensure_future(self._load(level, name, load))

            def landed(done: asyncio.Task[V]) -> None:
                if level.flights.get(name) is done:
                    del level.flights[name]
                # Looked at here, for every waiter may have gone before it failed.
                if not done.cancelled() and isinstance(done.exception(), CatalogUnavailable):
                    self._retry_at = self._clock() + RETRY_S
                    self._failing = True
                elif not self._followed:
                    self._failing = False

            task.add_done_callback(landed)
        return task

    async def _load(self, level: CacheLevel[V], name: str, load: Callable[[str], Awaitable[V]]) -> V:
        generation, min_version = self._generation, self._last.min_version(level.kind, name)
        value = await load(name)
        if generation == self._generation and min_version == self._last.min_version(level.kind, name):
            if value is None and level.kind == KEY:
                # Apart from the known ones, so that a flood of unknown keys cannot push those out.
                level.drop(name)
                self._note_unknown(name)
            else:
                level.put(name, value, self._fresh_until(level, name, value))
        return value

    def _note_unknown(self, sha256: str) -> None:
        if len(self._unknown) >= MAX_UNKNOWN:
            self._unknown.popitem(last=False)
        self._unknown[sha256] = self._clock() + UNKNOWN_TTL_S

    def _fresh_until(self, level: CacheLevel[V], name: str, value: V) -> float:
        now = self._clock()
        entry = level.entries.get(name)
        if entry is not None and entry[0] > now and _of_one_key(value, entry[1]):
            # Only its tier was asked for: the key is as old as it was.
            return entry[0]
        return now + self._l1_ttl_s * random.uniform(0.9, 1.1)

    async def _tier(self, name: str) -> HeldTier | None:
        entry = self._tiers.entries.get(name)
        if entry is not None and entry[0] > self._clock():
            if entry[1] is not None:
                entry[1].recent = True
            return entry[1]
        held = await self._load_through(self._tiers, name, self._load_tier)
        entry = self._tiers.entries.get(name)
        if held is not None and (entry is None or entry[1] is not held):
            # It was changed on the way: whoever holds it looks here again.
            held.current = False
        return held

    async def _current_tier(self, name: str) -> HeldTier | None:
        """As `_tier`; where it changed on the way, again: others may have begun to wait for this after the change."""
        held = await self._tier(name)
        for _ in range(_TRIES):
            if held is None or held.current or self._failing:
                break
            held = await self._tier(name)
        return held

    async def _load_caller(self, sha256: str) -> Caller | None:
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and entry[1] is not None:
            # Only its tier is out of date.
            api_key = entry[1].api_key
        else:
            _, api_key = await self.catalog.api_key(sha256, self._last.min_version(KEY, sha256))
        if api_key is None:
            return None
        held = await self._current_tier(api_key.tier)
        if held is None:
            raise CatalogUnavailable(f"the catalog knows the key {api_key.id} but not its tier {api_key.tier!r}: try again")
        return Caller(api_key, held)

    async def _load_tier(self, name: str) -> HeldTier | None:
        _, tier = await self.catalog.tier(name, self._last.min_version(TIER, name))
        # Whoever holds what was cached before looks here again.
        self._mark_tier_replaced(name)
        return None if tier is None else HeldTier(CompiledTier(tier))

    async def _load_anonymous(self, _: str) -> Caller | None:
        name = (await self.catalog.anonymous_tier(self._last.min_version(ANONYMOUS)))[1]
        if name is None:
            return None
        held = await self._current_tier(name)
        return None if held is None else Caller(None, held)


def _of_one_key(one: object, other: object) -> bool:
    return isinstance(one, Caller) and isinstance(other, Caller) and one.api_key is not None and one.api_key is other.api_key
