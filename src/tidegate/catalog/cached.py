"""The process cache (L1) that the gate reads: one level of cache in front of any `Catalog`.

Entries are complete compiled tiers and single API keys, never (key, path) pairs, so paths do not grow the cache. Keys are bounded
by `max_keys`; unknown keys by `MAX_UNKNOWN`, and they expire within seconds. Concurrent misses of one key or tier share one
query; the database's connection pool bounds the concurrent queries. While the catalog fails, entries are served up to
`stale_if_error_s` after they expire.

A change of the catalog invalidates only what it touched: one revoked key of a hundred thousand causes one query. A key that is
known to have changed is never served in its old state. A changed tier is, but only while the catalog fails: an old limit is
better than none. While the catalog answers, checks wait for it: an entry known to be replaced decides no check, however slow
the database is. Changed tiers are reloaded at once in the background, so that checks rarely wait.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

from tidegate.catalog import Catalog
from tidegate.catalog.access_lists import AccessLists
from tidegate.catalog.blocks import Blocks
from tidegate.catalog.cache_level import CacheLevel, Caller, UnkeyedCallers, V
from tidegate.catalog.caller_tokens import CallerTokens
from tidegate.catalog.changes import ALL, ANONYMOUS, CUSTOMER, CUSTOMER_VALUE, KEY, TIER, Changes, Item
from tidegate.catalog.customer_cache import CustomerCache
from tidegate.catalog.freshness import FreshnessTracker
from tidegate.catalog.loader import CacheLoader
from tidegate.catalog.tier_cache import TierCache
from tidegate.catalog.unknown_keys import UnknownKeyLimit
from tidegate.errors import CatalogUnavailable, TooManyUnknownKeys
from tidegate.jitter import JITTER
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.matching import CompiledTier
from tidegate.policy.namespaces import CompiledNamespace

MAX_UNKNOWN: Final = 10_000
UNKNOWN_TTL_S: Final = 5.0


class CachedCatalog:
    """Cached callers and tiers, for the gate.

    Args:
        l1_ttl_s: TTL of an entry, s, varied by ±10 % so that entries do not expire together.
        stale_if_error_s: how long after that an entry is still served while the catalog fails, s.
        max_keys: maximum number of cached API keys, 1 or more; each takes about 700 bytes.
        unknown_keys: limits the look-ups of unknown keys per client; None for no limit.

    Attributes:
        caller_tokens: receives each change as well; None if callers of the data plane need no token.
        blocks: receives each change as well; None where nobody can be blocked, as in a catalog in memory.
        access: what checks are compared with before anything is counted.
        on_change: called with the items that a change touched; ALL stands for any.
        customers: who owns API keys and attribute values.
        active_policy: what the policy says of callers without an API key, and of attributes; None if it has to be loaded.
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
        self.blocks: Blocks | None = None
        self.access = AccessLists()
        self.on_change: Callable[[Sequence[Item]], None] | None = None
        self.hits = 0
        self.active_policy: CallerPolicy | None = None
        self._l1_ttl_s = l1_ttl_s
        self._clock = clock
        self._callers: CacheLevel[Caller | None] = CacheLevel(KEY, max_keys)
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self.loader = CacheLoader(self, stale_if_error_s)
        self._tier_cache = TierCache(self)
        self._tiers = self._tier_cache.tiers
        self._unkeyed: CacheLevel[UnkeyedCallers] = CacheLevel(ANONYMOUS, 1)
        self.customers = CustomerCache(self)
        self._generation = 0
        self._last = FreshnessTracker()

    @property
    def version(self) -> int:
        """The catalog version that is active here: that of the last call of `changed`."""
        return self._last.version

    def is_at_hand(self, sha256: str) -> bool:
        """Whether `caller` would answer from memory."""
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and entry[1] is not None and entry[1].cached_tier.current:
            return True
        return self._unknown.get(sha256, 0.0) > self._clock()

    def cached_caller(self, sha256: str) -> Caller | None:
        """The caller that an API key belongs to, also if revoked or expired; None if `caller` must be used."""
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and (caller := entry[1]) is not None and caller.cached_tier.current:
            self.hits += 1
            caller.recent = True
            return caller
        return None

    def cached_anonymous(self) -> Caller | None:
        """The caller of checks without a key; None if `anonymous` must be used, or there is none."""
        callers = self.cached_unkeyed()
        return None if callers is None else callers.default

    def cached_unkeyed(self) -> UnkeyedCallers | None:
        """Who callers without an API key are, where memory alone knows it and the one that names no tier has one."""
        entry = self._unkeyed.entries.get("")
        if (
            entry is not None
            and entry[0] > self._clock()
            and (caller := entry[1].default) is not None
            and caller.cached_tier.current
        ):
            self.hits += 1
            return entry[1]
        return None

    def cached_caller_policy(self) -> CallerPolicy | None:
        """What the policy says of callers without an API key, and of attributes; None where it has to be loaded."""
        entry = self._unkeyed.entries.get("")
        return entry[1].policy if entry is not None and entry[0] > self._clock() else None

    @property
    def has_customer_values(self) -> bool:
        """Whether attribute values may belong to customers; also where that has to be loaded."""
        entry = self._unkeyed.entries.get("")
        return entry is None or bool(entry[1].policy.customer_attributes)

    def cached_tier_caller(self, name: str) -> Caller | None:
        """The caller without an API key of a tier; None where `tier_caller` has more to do."""
        entry = self._tiers.entries.get(name)
        if entry is not None and entry[0] > self._clock() and (held := entry[1]) is not None and held.current:
            self.hits += 1
            held.recent = True
            return held.unkeyed
        return None

    async def caller(self, sha256: str, client: str | None = None) -> Caller | None:
        """The caller that an API key belongs to.

        Args:
            client: address of the sender of the key, as returned by `client_of`; None if unknown or irrelevant.

        Returns:
            The caller, also for revoked and expired keys; None if the key is unknown. Costs 0.2 µs when cached.

        Raises:
            CatalogUnavailable: if the catalog fails and no cached entry can be served.
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
            return await self.loader.load_through(self._callers, sha256, self._load_caller)
        return await self._load_limited(sha256, client, self.unknown_keys)

    async def _load_limited(self, sha256: str, client: str, limit: UnknownKeyLimit) -> Caller | None:
        """Load a key that no other task is loading, within the client's limit. The limit does not apply to keys known before."""
        if sha256 not in self._callers.entries and sha256 not in self._callers.stale:
            wait_s = limit.wait_s(client)
            if wait_s > 0:
                limit.refused += 1
                raise TooManyUnknownKeys(
                    f"this address has sent too many unknown API keys: try again in {math.ceil(wait_s)} s",
                    retry_after=math.ceil(wait_s),
                )
        caller = await self.loader.load_through(self._callers, sha256, self._load_caller)
        if caller is None:
            limit.count(client)
        return caller

    async def anonymous(self) -> Caller | None:
        """The caller of checks without a key; None if such checks are rejected.

        Raises:
            CatalogUnavailable: if the catalog fails and no cached entry can be served.
        """
        return (await self._unkeyed_callers()).default

    async def caller_policy(self) -> CallerPolicy:
        """What the policy says of callers without an API key, and of attributes.

        Raises:
            CatalogUnavailable: if the catalog fails and nothing cached can stand in.
        """
        return self.cached_caller_policy() or (await self._unkeyed_callers()).policy

    async def namespaces(self) -> Mapping[str, CompiledNamespace]:
        """The namespaces of the policy, by name. Costs 0.2 µs when cached.

        Raises:
            CatalogUnavailable: if the catalog fails and no usable entry is cached.
        """
        return (await self._unkeyed_callers()).namespaces

    async def tier_caller(self, name: str) -> Caller | None:
        """The caller without an API key of a tier that a check names.

        Args:
            name: of the tier; any text. Only the names of tiers are looked up, so other texts cost no query.

        Returns:
            The caller; None where there is no such tier.

        Raises:
            CatalogUnavailable: if the catalog fails and nothing cached can stand in.
        """
        caller = self.cached_tier_caller(name)
        if caller is not None:
            return caller
        if not await self._tier_cache.is_tier(name):
            return None
        cached = await self._tier_cache.current(name)
        return None if cached is None else cached.unkeyed

    async def _unkeyed_callers(self) -> UnkeyedCallers:
        entry = self._unkeyed.entries.get("")
        if entry is not None and entry[0] > self._clock() and (entry[1].default is None or entry[1].default.cached_tier.current):
            self.hits += 1
            return entry[1]
        return await self.loader.load_through(self._unkeyed, "", self._load_unkeyed)

    async def tier(self, name: str) -> CompiledTier | None:
        """A compiled tier; None if it is unknown.

        Raises:
            CatalogUnavailable: if the catalog fails and no cached entry can be served.
        """
        cached = await self._tier_cache.find(name)
        return None if cached is None else cached.compiled

    async def fresh_tier(self, name: str) -> CompiledTier | None:
        """Like `tier`, but never an expired entry: for callers that changed the tier and can wait.

        Raises:
            CatalogUnavailable: if the catalog fails.
        """
        cached = await self._tier_cache.fresh(name)
        return None if cached is None else cached.compiled

    async def tier_names(self) -> list[str]:
        """The names of all tiers, sorted. Not cached: no check needs them.

        Raises:
            CatalogUnavailable: if the catalog fails.
        """
        return await self.catalog.tier_names()

    @property
    def failing(self) -> bool:
        """Whether the catalog does not answer."""
        return self.loader.failing

    @property
    def misses(self) -> int:
        """Entries that were not fresh when a check needed them."""
        return self.loader.misses

    @property
    def stale(self) -> int:
        """Expired entries that were served because the catalog failed or was slow."""
        return self.loader.stale

    def now(self) -> float:
        """The time on the clock of the entries, s."""
        return self._clock()

    def min_version(self, kind: str, name: str) -> int:
        """The lowest catalog version that an item may be read at."""
        return self._last.min_version(kind, name)

    def changed(self, changes: Changes) -> None:
        """Invalidate what was touched since `version`, or everything if that is unknown. Loads in progress are not cached."""
        everything = changes.version < self.version or changes.floor > self.version
        # What this process changed itself was invalidated by `touched` and may have been loaded since. If that were dropped,
        # checks of a key revoked here would get 503 should the catalog fail before the next load.
        new = [item for at, item in changes.items if everything or not self._last.is_known(at, item)]
        self._last.note(changes)
        if everything:
            self.invalidate()
        items = [item for _, item in changes.items]
        self._invalidate(new)
        if self.on_change is not None:
            self.on_change([*items, (ALL, "")] if everything else items)
        if self.caller_tokens is not None:
            self.caller_tokens.changed(items, everything=everything)
        if self.blocks is not None:
            self.blocks.changed(items, everything=everything)

    def touched(self, version: int, items: Iterable[Item]) -> None:
        """Invalidate what a change made in this process touched, without waiting for the follower to read it."""
        items = list(items)
        self._last.remember((version, item) for item in items)
        if (ALL, "") in items:
            self.invalidate()
        self._invalidate(items)
        if self.on_change is not None:
            self.on_change(items)
        if self.caller_tokens is not None:
            self.caller_tokens.changed(items)
        if self.blocks is not None:
            self.blocks.changed(items)

    def followed(self, *, failing: bool) -> None:
        """Record whether the catalog answers the follower, which queries the database and no cache."""
        self.loader.followed = True
        self.loader.failing = failing
        # Loaded again by the next request that needs them.
        if self.cached_caller_policy() is None:
            self.active_policy = None
            self.access.forget_policy()

    def invalidate(self) -> None:
        """Invalidate everything. Loads in progress are not cached."""
        self._generation += 1
        tiers = list(self._tiers.entries)
        for level in (self._callers, self._tiers, self._unkeyed, self._tier_cache.names):
            level.mark_all_stale()
        self.customers.invalidate()
        self.active_policy = None
        self.access.forget_policy()
        self._unknown.clear()
        self._tier_cache.schedule_reload(tiers)

    def _invalidate(self, items: Iterable[Item]) -> None:
        for kind, name in items:
            if kind == KEY:
                self._callers.drop(name)
                self._unknown.pop(name, None)
            elif kind == TIER:
                self._tier_cache.mark_replaced(name)
                self._tiers.mark_stale(name)
                # It may be new, or gone. Names that are being read meanwhile may lack it.
                names = self._tier_cache.names
                self._generation += "" in names.flights
                names.mark_stale("")
                if name in self._tiers.stale:
                    self._tier_cache.schedule_reload([name])
            elif kind in (CUSTOMER, CUSTOMER_VALUE):
                self.customers.changed(kind, name)
            elif kind == ANONYMOUS:
                self._unkeyed.mark_stale("")
                self.active_policy = None
                self.access.forget_policy()

    def __len__(self) -> int:
        """Number of cached API keys, including unknown ones."""
        return len(self._callers.entries) + len(self._unknown)

    def stale_value(self, level: CacheLevel[V], name: str, value: V) -> tuple[bool, V]:
        """Whether an entry is known to be replaced, and the value to serve if the catalog returns no newer one."""
        if name not in level.entries:
            return True, value
        if isinstance(value, Caller) and not value.cached_tier.current:
            # Its tier was replaced, because it changed or was loaded again; the key itself is unchanged.
            entry = self._tiers.entries.get(value.cached_tier.compiled.tier.name)
            if entry is None or entry[1] is None or not entry[1].current:
                return True, value
            customer = value.cached_tier.customer
            if customer is not None and not customer.current:
                return True, value
            return False, Caller(value.api_key, entry[1] if customer is None else customer.tier(entry[1]))  # type: ignore[return-value]
        if isinstance(value, UnkeyedCallers) and value.default is not None and not value.default.cached_tier.current:
            entry = self._tiers.entries.get(value.default.cached_tier.compiled.tier.name)
            if entry is None or entry[1] is None or not entry[1].current:
                return True, value
            return False, UnkeyedCallers(value.policy, Caller(None, entry[1]))  # type: ignore[return-value]
        return False, value

    async def load(self, level: CacheLevel[V], name: str, load: Callable[[str], Awaitable[V]]) -> V:
        """Load an entry and store it, unless it changed meanwhile."""
        generation, min_version = self._generation, self._last.min_version(level.kind, name)
        value = await load(name)
        if generation == self._generation and min_version == self._last.min_version(level.kind, name):
            if value is None and level.kind == KEY:
                # Stored separately, so that a flood of unknown keys does not evict known ones.
                level.drop(name)
                self._note_unknown(name)
            else:
                level.put(name, value, self._fresh_until(level, name, value))
                if isinstance(value, UnkeyedCallers):
                    self.active_policy = value.policy
                    self.access.replace_policy(value.policy.access)
        return value

    def _note_unknown(self, sha256: str) -> None:
        if len(self._unknown) >= MAX_UNKNOWN:
            self._unknown.popitem(last=False)
        self._unknown[sha256] = self._clock() + UNKNOWN_TTL_S

    def _fresh_until(self, level: CacheLevel[V], name: str, value: V) -> float:
        now = self._clock()
        entry = level.entries.get(name)
        if entry is not None and entry[0] > now and _is_same_key(value, entry[1]):
            # Only its tier was reloaded: the age of the key is unchanged.
            return entry[0]
        return now + self._l1_ttl_s * JITTER.uniform(0.9, 1.1)

    async def _load_caller(self, sha256: str) -> Caller | None:
        entry = self._callers.entries.get(sha256)
        if entry is not None and entry[0] > self._clock() and entry[1] is not None:
            # Only its tier is out of date.
            api_key = entry[1].api_key
        else:
            _, api_key = await self.catalog.api_key(sha256, self._last.min_version(KEY, sha256))
        if api_key is None:
            return None
        customer = await self.customers.current(api_key.customer) if api_key.customer else None
        tier = customer.record.tier if customer is not None and api_key.inherits_tier else api_key.tier
        cached = await self._tier_cache.current(tier)
        if cached is None:
            raise CatalogUnavailable(f"the catalog has the API key {api_key.id} but not its tier {tier!r}: try again")
        return Caller(api_key, cached if customer is None else customer.tier(cached))

    async def _load_unkeyed(self, _: str) -> UnkeyedCallers:
        policy = (await self.catalog.caller_policy(self._last.min_version(ANONYMOUS)))[1]
        cached = None if policy.default_tier is None else await self._tier_cache.current(policy.default_tier)
        return UnkeyedCallers(policy, None if cached is None else Caller(None, cached))


def _is_same_key(one: object, other: object) -> bool:
    return isinstance(one, Caller) and isinstance(other, Caller) and one.api_key is not None and one.api_key is other.api_key
