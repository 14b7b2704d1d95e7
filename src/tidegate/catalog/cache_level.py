"""The entries of the cache in front of the catalog (compiled tiers and callers), and the bounded table that stores them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final, Generic, TypeVar

from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import ApiKey, KeyStatus
from tidegate.policy.namespaces import CompiledNamespace
from tidegate.policy.periods import DEFAULT_ANCHOR

SECOND_CHANCES: Final = 16
"""Maximum number of recently used entries skipped per eviction: bounds the work of one check when all entries are in use."""

V = TypeVar("V", bound="CachedTier | Caller | UnkeyedCallers | TierNames | None")


class CachedTier:
    """A cached compiled tier. `current` is False once the cache has replaced it."""

    __slots__ = ("_unkeyed", "compiled", "current", "recent")

    def __init__(self, compiled: CompiledTier) -> None:
        self.compiled = compiled
        self.current = True
        self.recent = False
        self._unkeyed: Caller | None = None

    @property
    def unkeyed(self) -> Caller:
        """The caller of this tier that has no API key."""
        if self._unkeyed is None:
            self._unkeyed = Caller(None, self)
        return self._unkeyed


class TierNames:
    """The names of all tiers: no other name that a client sends is looked up."""

    __slots__ = ("names", "recent")

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.recent = False


class Caller:
    """A caller and its rules. `api_key` is None for callers without a key.

    Attributes:
        form_checked: whether a key of valid format was received for it; a look-up by digest does not show that.
        never_ends: whether the key is active and does not expire, or there is none.
        anchor: when the periods of its quotas begin.
        key_id: id of the key; empty without one.
        quota_subject: whom quotas count; empty for the client's address, where there is no key.
    """

    __slots__ = (
        "_quotas",
        "anchor",
        "api_key",
        "cached_tier",
        "form_checked",
        "key_id",
        "never_ends",
        "quota_subject",
        "recent",
        "subject",
        "tier",
    )

    def __init__(self, api_key: ApiKey | None, cached_tier: CachedTier) -> None:
        self.api_key = api_key
        self.cached_tier = cached_tier
        self.recent = False
        self.form_checked = False
        self.never_ends = api_key is None or (api_key.status is KeyStatus.ACTIVE and api_key.expires_at_us is None)
        # The tier's rules, with the key's own limits where it has any.
        self.tier = (
            cached_tier.compiled
            if api_key is None or not api_key.overrides
            else CompiledTier(cached_tier.compiled.tier, api_key.overrides)
        )
        self.subject = "" if api_key is None else f"k:{api_key.owner}"
        self.anchor = DEFAULT_ANCHOR
        self.quota_subject = self.subject
        self.key_id = "" if api_key is None else api_key.id
        self._quotas: LimitSet | None = None

    @property
    def quotas(self) -> LimitSet | None:
        """Its tier's quotas, with periods by its anchor; None where there are none. The anchor must not change after that."""
        if self._quotas is None and self.tier.quotas is not None:
            self._quotas = self.tier.quotas.of(self.anchor)
        return self._quotas


class UnkeyedCallers:
    """Who callers without an API key are.

    Args:
        policy: what the policy says of them.
        default: the caller that names no tier; None where such a one is refused.

    Attributes:
        namespaces: those of the policy by name, ready to be counted.
    """

    __slots__ = ("default", "namespaces", "policy", "recent", "tier_from")

    def __init__(self, policy: CallerPolicy, default: Caller | None) -> None:
        self.policy = policy
        self.tier_from = policy.tier_from
        self.default = default
        self.namespaces = {namespace.name: CompiledNamespace(namespace) for namespace in policy.namespaces}
        self.recent = False


class CacheLevel(Generic[V]):
    """A bounded cache of one kind of entry; concurrent misses of one name share one load.

    The oldest entry is evicted first, but one that was used since it was stored is moved to the back once (CLOCK; Corbató 1968):
    nearly as good as LRU, and a hit only sets a flag instead of moving the entry.

    `stale` contains entries that may be out of date; they are served only while the catalog fails.
    """

    def __init__(self, kind: str, max_entries: int) -> None:
        self.kind = kind
        self.max_entries = max_entries
        # Not a dict: finding its first entry takes longer the more entries were removed from its front.
        self.entries: OrderedDict[str, tuple[float, V]] = OrderedDict()
        self.stale: OrderedDict[str, tuple[float, V]] = OrderedDict()
        self.flights: dict[str, asyncio.Task[V]] = {}

    def put(self, name: str, value: V, fresh_until: float) -> None:
        """Store an entry; evict the oldest one if the cache is full."""
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
        """Serve an entry only while the catalog fails."""
        entry = self.entries.pop(name, None)
        if entry is not None:
            self.stale[name] = entry
            self._bound_stale()
        self.flights.pop(name, None)

    def mark_all_stale(self) -> None:
        """Serve all entries only while the catalog fails."""
        self.stale.update(self.entries)
        self.entries = OrderedDict()
        self.flights.clear()
        self._bound_stale()

    def drop(self, name: str) -> None:
        """Remove an entry; it is not served even while the catalog fails."""
        self.entries.pop(name, None)
        self.stale.pop(name, None)
        self.flights.pop(name, None)

    def _bound_stale(self) -> None:
        while len(self.stale) > self.max_entries:
            self.stale.popitem(last=False)
