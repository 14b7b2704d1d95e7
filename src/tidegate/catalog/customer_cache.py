"""Customers in the process cache (L1), and which attribute values belong to one.

Customers are cached as tiers are: a changed one is served only while the catalog fails. Values are cached as API keys are, also
those that belong to nobody: they come from trusted proxies and back ends, and the cache is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from tidegate.catalog.cache_level import CachedCustomer, CacheLevel, CustomerName
from tidegate.catalog.changes import CUSTOMER, CUSTOMER_VALUE
from tidegate.errors import CatalogUnavailable
from tidegate.policy.customers import value_digest

if TYPE_CHECKING:
    from tidegate.catalog.cached import CachedCatalog

MAX_CUSTOMERS: Final = 100_000
MAX_VALUES: Final = 100_000
_MAX_ATTEMPTS: Final = 3


class CustomerCache:
    """Cached customers. A part of `CachedCatalog`, which loads and invalidates them."""

    def __init__(self, cached: CachedCatalog) -> None:
        self._cached = cached
        self._customers: CacheLevel[CachedCustomer | None] = CacheLevel(CUSTOMER, MAX_CUSTOMERS)
        self._values: CacheLevel[CustomerName | None] = CacheLevel(CUSTOMER_VALUE, MAX_VALUES)

    async def current(self, name: str) -> CachedCustomer:
        """A customer that is known to exist; loaded again if it changes meanwhile.

        Raises:
            CatalogUnavailable: if the catalog fails and no usable entry is cached, or has just lost the customer.
        """
        found = await self.find(name)
        if found is None:
            raise CatalogUnavailable(f"the catalog has a key or a value of the customer {name!r} but not the customer: try again")
        return found

    async def find(self, name: str) -> CachedCustomer | None:
        """A customer, or None; loaded again if it changes meanwhile.

        Raises:
            CatalogUnavailable: if the catalog fails and no usable entry is cached.
        """
        found = await self._customer(name)
        for _ in range(_MAX_ATTEMPTS):
            if found is None or found.current or self._cached.failing:
                break
            found = await self._customer(name)
        return found

    def cached_owner(self, values: Iterable[tuple[str, str]]) -> tuple[bool, CachedCustomer | None]:
        """The customer that attribute values belong to, where memory alone knows it. Costs 1.5 µs for each value.

        Args:
            values: attributes and their values; the first that belongs to a customer decides.

        Returns:
            Whether memory knows it; and the customer, None where the values belong to nobody.
        """
        now = self._cached.now()
        for attribute, value in values:
            entry = self._values.entries.get(value_digest(attribute, value))
            if entry is None or entry[0] <= now or entry[1] is None:
                return False, None
            if entry[1].name:
                entry[1].recent = True
                owner = self._customers.entries.get(entry[1].name)
                if owner is None or owner[0] <= now or owner[1] is None:
                    return False, None
                owner[1].recent = True
                return True, owner[1]
        return True, None

    async def owner(self, values: Iterable[tuple[str, str]]) -> CachedCustomer | None:
        """As `cached_owner`, loaded where necessary.

        Raises:
            CatalogUnavailable: if the catalog fails and no usable entry is cached.
        """
        for attribute, value in values:
            digest = value_digest(attribute, value)
            entry = self._values.entries.get(digest)
            found = (
                entry[1]
                if entry is not None and entry[0] > self._cached.now()
                else await self._cached.loader.load_through(self._values, digest, self._load_name)
            )
            if found is not None and found.name:
                return await self.current(found.name)
        return None

    def changed(self, kind: str, name: str) -> None:
        """Invalidate a customer, or an attribute value by its digest."""
        if kind == CUSTOMER_VALUE:
            self._values.drop(name)
            return
        entry = self._customers.entries.get(name)
        if entry is not None and entry[1] is not None:
            entry[1].replace()
        self._customers.mark_stale(name)

    def invalidate(self) -> None:
        """Invalidate everything."""
        for _, customer in self._customers.entries.values():
            if customer is not None:
                customer.replace()
        self._customers.mark_all_stale()
        self._values.mark_all_stale()

    async def _customer(self, name: str) -> CachedCustomer | None:
        entry = self._customers.entries.get(name)
        if entry is not None and entry[0] > self._cached.now():
            if entry[1] is not None:
                entry[1].recent = True
            return entry[1]
        found = await self._cached.loader.load_through(self._customers, name, self._load_customer)
        entry = self._customers.entries.get(name)
        if found is not None and (entry is None or entry[1] is not found):
            # It changed during the load: its callers must read the cache again.
            found.replace()
        return found

    async def _load_customer(self, name: str) -> CachedCustomer | None:
        record = (await self._cached.catalog.customer(name, self._cached.min_version(CUSTOMER, name)))[1]
        entry = self._customers.entries.get(name)
        previous = None if entry is None else entry[1]
        if previous is not None:
            if record == previous.record and previous.current:
                return previous
            previous.replace()
        return None if record is None else CachedCustomer(record)

    async def _load_name(self, digest: str) -> CustomerName | None:
        return CustomerName(
            (await self._cached.catalog.customer_name(digest, self._cached.min_version(CUSTOMER_VALUE, digest)))[1]
        )
