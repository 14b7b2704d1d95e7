"""The shared cache (L2): one for all instances, in the Redis of their counters.

Entries are complete tiers, single API keys, and the policy for callers without a key, each with the catalog version it was read
at. An instance that knows of a change at version N ignores entries of older versions; so no entry has to be deleted, and an entry
that is written late does no harm. Entries of versions that the database is not known to have had are ignored too: a primary may
have assigned the version and then been lost with its last changes. Unknown keys are not stored: a flood of them would fill Redis.
Every entry expires. Entries are sealed with a secret of the catalog and validated when they are read (`shared_entries`): write
access to Redis does not allow forging an entry.

While Redis does not answer, all look-ups go to the database; Redis is retried after a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

import msgspec

from tidegate.catalog import Catalog
from tidegate.catalog.changes import MAX_READ, Changes
from tidegate.catalog.shared_entries import (
    AnyEntry,
    CallersEntry,
    CustomerEntry,
    Entry,
    EntrySeal,
    InvalidEntry,
    KeyEntry,
    TierEntry,
    require_valid_customer,
    require_valid_key,
    require_valid_tier,
)
from tidegate.errors import StoreUnavailable
from tidegate.jitter import JITTER
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.customers import Customer
from tidegate.policy.model import ApiKey, Tier

logger = logging.getLogger(__name__)

RETRY_S: Final = 1.0
WARN_S: Final = 60.0
"""Minimum interval between log messages about invalid entries: another client that writes them must not fill the log."""


class SharedStore(Protocol):
    """The part of the counters' Redis store that the shared cache needs."""

    async def call(self, tag: bytes, *parts: str | bytes) -> Any:
        """Run a command on the shard of a hash tag.

        Raises:
            StoreUnavailable: if there is no reply.
        """
        ...


class SharedCatalog:
    """A catalog with a cache that all instances share.

    Args:
        secret: the catalog's secret, the same for all its instances; 16 bytes or more.
        ttl_s: TTL of an entry, s, varied by ±10 %.

    Attributes:
        hits: answers from the cache.
        misses: answers from the database.
        errors: how often the cache did not answer.
        refused: entries ignored because they are invalid or were not written by an instance of this catalog.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: SharedStore,
        secret: bytes,
        ttl_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.catalog = catalog
        self.hits = self.misses = self.errors = self.refused = 0
        self._store = store
        self._ttl_s = ttl_s
        self._clock = clock
        self._retry_at = 0.0
        self._writes: set[asyncio.Task[None]] = set()
        # Versions that the database had, ascending; empty until `changes` is called.
        self._versions: OrderedDict[int, None] = OrderedDict()
        self._latest = 0
        self._seal = EntrySeal(secret)
        self._form = self._seal.form
        self._warn_at = -WARN_S
        self._keys = msgspec.msgpack.Decoder(KeyEntry)
        self._tiers = msgspec.msgpack.Decoder(TierEntry)
        self._customers = msgspec.msgpack.Decoder(CustomerEntry)
        self._caller_policies = msgspec.msgpack.Decoder(CallersEntry)

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        """See `Catalog.api_key`."""
        name = f"k:{sha256}"
        cached = await self._get(name, self._keys, min_version, lambda entry: require_valid_key(entry.value, sha256))
        if cached is not None:
            return cached.version, cached.value
        version, api_key = await self.catalog.api_key(sha256, min_version)
        if api_key is not None:
            self._write_later(name, KeyEntry(version, api_key))
        return version, api_key

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        """See `Catalog.tier`."""
        entry_name = f"t:{name}"
        cached = await self._get(entry_name, self._tiers, min_version, lambda entry: require_valid_tier(entry.value, name))
        if cached is not None:
            return cached.version, cached.value
        version, tier = await self.catalog.tier(name, min_version)
        if tier is not None:
            self._write_later(entry_name, TierEntry(version, tier))
        return version, tier

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        """See `Catalog.caller_policy`."""
        cached = await self._get("a", self._caller_policies, min_version)
        if cached is not None:
            return cached.version, cached.value
        version, policy = await self.catalog.caller_policy(min_version)
        self._write_later("a", CallersEntry(version, policy))
        return version, policy

    async def customer(self, name: str, min_version: int = 0) -> tuple[int, Customer | None]:
        """See `Catalog.customer`."""
        entry_name = f"c:{name}"
        require_valid = partial(require_valid_customer, name=name)
        cached = await self._get(entry_name, self._customers, min_version, lambda entry: require_valid(entry.value))
        if cached is not None:
            return cached.version, cached.value
        version, customer = await self.catalog.customer(name, min_version)
        if customer is not None:
            self._write_later(entry_name, CustomerEntry(version, customer))
        return version, customer

    async def customer_name(self, digest: str, min_version: int = 0) -> tuple[int, str]:
        """See `Catalog.customer_name`; not cached, as unknown keys are not."""
        return await self.catalog.customer_name(digest, min_version)

    async def tier_names(self) -> list[str]:
        """See `Catalog.tier_names`; not cached."""
        return await self.catalog.tier_names()

    async def changes(self, since: int) -> Changes:
        """See `Catalog.changes`; not cached, but the versions are stored."""
        changes = await self.catalog.changes(since)
        if self._latest not in changes.versions:
            self._versions.clear()
        self._versions.update(dict.fromkeys(changes.versions))
        self._latest = changes.version
        while len(self._versions) > MAX_READ:
            self._versions.popitem(last=False)
        return changes

    async def version(self) -> int:
        """See `Catalog.version`; not cached."""
        return await self.catalog.version()

    async def ping(self) -> None:
        """See `Catalog.ping`: of the database."""
        await self.catalog.ping()

    async def close(self) -> None:
        """See `Catalog.close`; the store is not closed, because the counters own it."""
        await self.settle()
        await self.catalog.close()

    async def settle(self) -> None:
        """Wait for entries being written."""
        await asyncio.gather(*self._writes)

    async def _get(
        self,
        name: str,
        decoder: msgspec.msgpack.Decoder[AnyEntry],
        min_version: int,
        require_valid: Callable[[AnyEntry], None] | None = None,
    ) -> AnyEntry | None:
        if self._clock() < self._retry_at:
            return None
        tag, key = self._tag_and_key(name)
        try:
            raw = await self._store.call(tag, "GET", key)
        except StoreUnavailable as error:
            if "WRONGTYPE" not in error.message:
                self._failed(error)
                return None
            # Only this key is unusable; the next write replaces it, whatever its type.
            self._reject(key, InvalidEntry("it is not a string"))
            raw = None
        if isinstance(raw, bytes):
            try:
                entry = self._seal.open(name.encode(), raw, decoder)
                if require_valid is not None:
                    require_valid(entry)
            except InvalidEntry as error:
                self._reject(key, error)
            else:
                version = entry.version
                # An entry newer than the known versions is ignored too: it may be from a primary that was lost.
                if version >= min_version and (not self._versions or version in self._versions):
                    self.hits += 1
                    return entry
        self.misses += 1
        return None

    def _reject(self, key: bytes, error: InvalidEntry) -> None:
        self.refused += 1
        if self._clock() >= self._warn_at + WARN_S:
            self._warn_at = self._clock()
            logger.warning(
                "invalid entry ignored in the shared cache in Redis, key %s: %s; if this repeats, another client writes these "
                "keys: restrict write access to this Redis",
                key.decode(),
                error,
            )

    def _write_later(self, name: str, entry: Entry) -> None:
        """Write an entry in the background."""
        task = asyncio.ensure_future(self._put(name, entry))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _put(self, name: str, entry: Entry) -> None:
        if self._clock() < self._retry_at:
            return
        tag, key = self._tag_and_key(name)
        ttl_ms = round(self._ttl_s * 1000 * JITTER.uniform(0.9, 1.1))
        try:
            await self._store.call(tag, "SET", key, self._seal.seal(name.encode(), entry), "PX", str(ttl_ms))
        except StoreUnavailable as error:
            self._failed(error)

    def _tag_and_key(self, name: str) -> tuple[bytes, bytes]:
        """The hash tag and the key of an entry. The tag is hex: a name could contain a brace."""
        tag = hashlib.blake2b(name.encode(), digest_size=12).hexdigest().encode()
        return tag, b"tgc:{%b}%b" % (tag, self._form.encode())

    def _failed(self, error: StoreUnavailable) -> None:
        if self._clock() >= self._retry_at:
            self.errors += 1
            logger.debug("the shared cache does not answer: %s", error)
        self._retry_at = self._clock() + RETRY_S
