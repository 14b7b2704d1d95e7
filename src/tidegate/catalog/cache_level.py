"""The entries of the cache in front of the catalog (compiled tiers and callers), and the bounded table that stores them."""

from __future__ import annotations

import asyncio
import weakref
from collections import OrderedDict
from typing import Final, Generic, TypeVar

from tidegate.counters import Counters
from tidegate.decision import CallerIdentity
from tidegate.observation import UsageMemo
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.customers import Customer
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledRule, CompiledTier
from tidegate.policy.model import ApiKey, KeyStatus
from tidegate.policy.namespaces import CompiledNamespace
from tidegate.policy.overrides import Override, active_overrides, first_end_us, in_precedence
from tidegate.policy.periods import DEFAULT_ANCHOR

SECOND_CHANCES: Final = 16
"""Maximum number of recently used entries skipped per eviction: bounds the work of one check when all entries are in use."""

V = TypeVar("V", bound="CachedTier | CachedCustomer | Caller | CustomerName | UnkeyedCallers | TierNames | None")


class CachedTier:
    """A cached compiled tier, or one with the overrides of a customer.

    Args:
        compiled: the tier.
        customer: whose callers use it; None for the tier itself.

    Attributes:
        current: False once the cache has replaced it, or its customer.
        compiled: with the customer's overrides that have not ended.
        overrides: those overrides, in the order of precedence.
    """

    __slots__ = (
        "__weakref__",
        "_base",
        "_derived",
        "_unkeyed",
        "compiled",
        "current",
        "customer",
        "end_us",
        "overrides",
        "recent",
    )

    def __init__(self, compiled: CompiledTier, customer: CachedCustomer | None = None) -> None:
        self.current = True
        self.recent = False
        self.customer = customer
        self._unkeyed: Caller | None = None
        self._derived: weakref.WeakSet[CachedTier] | None = None
        self._base = compiled
        self.overrides: tuple[Override, ...] = ()
        # They are those of the customer's own tier.
        if customer is not None and customer.record.tier == compiled.tier.name:
            self.overrides = in_precedence(customer.record.overrides)
        self.end_us = first_end_us(self.overrides)
        self.compiled = CompiledTier(compiled.tier, self.overrides, compiled) if self.overrides else compiled

    @property
    def unkeyed(self) -> Caller:
        """The caller of this tier that has no API key."""
        if self._unkeyed is None:
            self._unkeyed = Caller(None, self)
        return self._unkeyed

    def replace(self) -> None:
        """Note that the cache has replaced it: its users must read the cache again."""
        self.current = False
        for each in self._derived or ():
            each.current = False

    def derive(self, customer: CachedCustomer) -> CachedTier:
        """This tier for callers of a customer."""
        made = CachedTier(self.compiled, customer)
        if self._derived is None:
            self._derived = weakref.WeakSet()
        self._derived.add(made)
        return made

    def end_overrides(self, now_us: int) -> None:
        """Stop applying the overrides that have ended."""
        if self.end_us is not None and now_us >= self.end_us:
            self.overrides = active_overrides(self.overrides, now_us)
            self.end_us = first_end_us(self.overrides)
            self.compiled = CompiledTier(self._base.tier, self.overrides, self._base) if self.overrides else self._base


class CachedCustomer:
    """A cached customer. `current` is False once the cache has replaced it."""

    __slots__ = ("_tiers", "anchor", "current", "recent", "record", "subject")

    def __init__(self, record: Customer) -> None:
        self.record = record
        self.current = True
        self.recent = False
        self.subject = f"c:{record.name}"
        self.anchor = record.period_anchor
        self._tiers: dict[str, CachedTier] = {}

    def tier(self, base: CachedTier) -> CachedTier:
        """A tier for callers of this customer."""
        name = base.compiled.tier.name
        found = self._tiers.get(name)
        if found is None or not found.current:
            found = self._tiers[name] = base.derive(self)
            found.current = self.current and base.current
        return found

    def replace(self) -> None:
        """Note that the cache has replaced it: its callers must read the cache again."""
        self.current = False
        for each in self._tiers.values():
            each.current = False


class CustomerName:
    """The name of the customer that an attribute value belongs to; empty for none."""

    __slots__ = ("name", "recent")

    def __init__(self, name: str) -> None:
        self.name = name
        self.recent = False


class TierNames:
    """The names of all tiers: no other name that a client sends is looked up."""

    __slots__ = ("names", "recent")

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.recent = False


class Caller(UsageMemo):
    """A caller and its rules. `api_key` is None for callers without a key.

    Attributes:
        form_checked: whether a key of valid format was received for it; a look-up by digest does not show that.
        never_ends: whether the key is active and neither it nor one of its overrides ends, or there is no key.
        tier: the tier's rules, with the key's own limits where it has any.
        anchor: when the periods of its quotas begin.
        quota_subject: whom quotas count: the customer, or else the key; empty for the client's address, where there is neither.
        customer_subject: whom rules by customer count; empty for the caller itself, where there is no customer.
        identity: who it is, for decisions; None where there is neither a key nor a customer.
        last_counters: the rule that answered its last check, and the counters of that, where they depend on nothing else.
    """

    __slots__ = (
        "_end_us",
        "_overrides",
        "_quotas",
        "anchor",
        "api_key",
        "cached_tier",
        "customer_subject",
        "form_checked",
        "identity",
        "last_counters",
        "never_ends",
        "quota_subject",
        "recent",
        "subject",
        "tier",
    )

    def __init__(self, api_key: ApiKey | None, cached_tier: CachedTier) -> None:
        customer = cached_tier.customer
        super().__init__("" if api_key is None else api_key.id, "" if customer is None else customer.record.name)
        self.api_key = api_key
        self.cached_tier = cached_tier
        self.recent = False
        self.form_checked = False
        self._overrides = () if api_key is None or not api_key.overrides else in_precedence(api_key.overrides)
        self._quotas: LimitSet | None = None
        self._compile()
        self.never_ends = self._end_us is None and (
            api_key is None or (api_key.status is KeyStatus.ACTIVE and api_key.expires_at_us is None)
        )
        self.subject = "" if api_key is None else f"k:{api_key.owner}"
        self.identity: CallerIdentity | None = None
        if customer is None:
            self.customer_subject = ""
            self.anchor = DEFAULT_ANCHOR
            self.quota_subject = self.subject
            if api_key is not None:
                self.identity = CallerIdentity(api_key.id, None)
        else:
            self.customer_subject = self.quota_subject = customer.subject
            self.anchor = customer.anchor
            self.identity = CallerIdentity(None if api_key is None else api_key.id, customer.record.name)

    @property
    def quotas(self) -> LimitSet | None:
        """Its tier's quotas, with periods by its anchor; None where there are none."""
        if self._quotas is None and self.tier.quotas is not None:
            self._quotas = self.tier.quotas.of(self.anchor)
        return self._quotas

    def end_overrides(self, now_us: int) -> None:
        """Stop applying the overrides that have ended. Costs 0.1 µs until one has.

        Args:
            now_us: µs since the epoch.
        """
        if self._end_us is not None and now_us >= self._end_us:
            self.cached_tier.end_overrides(now_us)
            self._overrides = active_overrides(self._overrides, now_us)
            self._quotas = None
            self._compile()

    def _compile(self) -> None:
        tier = self.cached_tier
        self._end_us = first_end_us(tier.overrides, self._overrides)
        self.last_counters: tuple[CompiledRule | None, Counters] | None = None
        # A key's own limits take precedence over its customer's.
        self.tier = tier.compiled
        if self._overrides:
            self.tier = CompiledTier(tier.compiled.tier, (*tier.overrides, *self._overrides), tier.compiled)


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
