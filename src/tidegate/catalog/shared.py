"""The second level of cache: one for all instances, in the Redis that they count on.

What is kept is a whole tier, a single API key, and the name of the anonymous tier, each with the version of the catalog that it
is of. Whoever knows that a thing was changed at version N takes no entry of an older one; so nothing has to be deleted, and an
entry that is written late harms nobody. Nor does anybody take an entry of a version that the database never had, as far as is
known: a primary may have given it that was lost with its last changes. Unknown keys are not kept: a flood of them would fill
Redis. Every entry expires. Entries are sealed with a secret of the catalog and validated when they are read (`shared_entries`):
who can write to Redis cannot let anybody in.

While Redis does not answer, everything goes to the database, and Redis is asked again after a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from tidegate.catalog import Catalog
from tidegate.catalog.changes import MAX_READ, Changes
from tidegate.catalog.shared_entries import (
    AnyEntry,
    Entry,
    EntrySeal,
    InvalidEntry,
    KeyEntry,
    NameEntry,
    TierEntry,
    require_valid_key,
    require_valid_tier,
)
from tidegate.errors import StoreUnavailable
from tidegate.policy.model import ApiKey, Tier

logger = logging.getLogger(__name__)

AWAY_S: Final = 1.0
WARN_S: Final = 60.0
"""So often the log says at most that entries are refused: whoever writes them must not fill it."""


class SharedStore(Protocol):
    """The Redis of the counters, as far as the catalog needs it."""

    async def call(self, tag: bytes, *parts: str | bytes) -> Any:
        """Run a command on the shard of a hash tag.

        Raises:
            StoreUnavailable: if there is none.
        """
        ...


class SharedCatalog:
    """A catalog with a cache that all instances share.

    Args:
        secret: of the catalog, the same for all its instances; 16 bytes or more.
        ttl_s: how long an entry lives, s, give or take a tenth.

    Attributes:
        hits: answers from the cache.
        misses: answers from the database, which the cache did not have.
        errors: times that the cache did not answer.
        refused: entries that were not taken, because no instance of this catalog wrote them or they make no sense.
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
        self._away_until = 0.0
        self._keeping: set[asyncio.Task[None]] = set()
        # Versions that the database had, ascending; empty as long as nobody follows it.
        self._versions: OrderedDict[int, None] = OrderedDict()
        self._latest = 0
        self._seal = EntrySeal(secret)
        self._form = self._seal.form
        self._warn_at = -WARN_S
        self._keys = msgspec.msgpack.Decoder(KeyEntry)
        self._tiers = msgspec.msgpack.Decoder(TierEntry)
        self._names = msgspec.msgpack.Decoder(NameEntry)

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        """See `Catalog.api_key`."""
        name = f"k:{sha256}"
        held = await self._get(name, self._keys, min_version, lambda entry: require_valid_key(entry.value, sha256))
        if held is not None:
            return held.version, held.value
        version, api_key = await self.catalog.api_key(sha256, min_version)
        if api_key is not None:
            self._keep(name, KeyEntry(version, api_key))
        return version, api_key

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        """See `Catalog.tier`."""
        place = f"t:{name}"
        held = await self._get(place, self._tiers, min_version, lambda entry: require_valid_tier(entry.value, name))
        if held is not None:
            return held.version, held.value
        version, tier = await self.catalog.tier(name, min_version)
        if tier is not None:
            self._keep(place, TierEntry(version, tier))
        return version, tier

    async def anonymous_tier(self, min_version: int = 0) -> tuple[int, str | None]:
        """See `Catalog.anonymous_tier`."""
        held = await self._get("a", self._names, min_version)
        if held is not None:
            return held.version, held.value
        version, name = await self.catalog.anonymous_tier(min_version)
        self._keep("a", NameEntry(version, name))
        return version, name

    async def tier_names(self) -> list[str]:
        """See `Catalog.tier_names`; not cached."""
        return await self.catalog.tier_names()

    async def changes(self, since: int) -> Changes:
        """See `Catalog.changes`; not cached, but what it says of versions is remembered."""
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
        """See `Catalog.close`; the store is somebody else's."""
        await self.settle()
        await self.catalog.close()

    async def settle(self) -> None:
        """Wait for entries that are being written."""
        await asyncio.gather(*self._keeping)

    async def _get(
        self,
        name: str,
        decoder: msgspec.msgpack.Decoder[AnyEntry],
        min_version: int,
        require_valid: Callable[[AnyEntry], None] | None = None,
    ) -> AnyEntry | None:
        if self._clock() < self._away_until:
            return None
        tag, key = self._place(name)
        try:
            raw = await self._store.call(tag, "GET", key)
        except StoreUnavailable as error:
            if "WRONGTYPE" not in error.message:
                self._failed(error)
                return None
            # Only this key is unusable; the entry that is written next replaces it, whatever its type.
            self._refuse(key, InvalidEntry("it is not a string"))
            raw = None
        if isinstance(raw, bytes):
            try:
                entry = self._seal.open(name.encode(), raw, decoder)
                if require_valid is not None:
                    require_valid(entry)
            except InvalidEntry as error:
                self._refuse(key, error)
            else:
                version = entry.version
                # One that is newer than what is known here is not taken either: it may be of a primary that was lost.
                if version >= min_version and (not self._versions or version in self._versions):
                    self.hits += 1
                    return entry
        self.misses += 1
        return None

    def _refuse(self, key: bytes, error: InvalidEntry) -> None:
        self.refused += 1
        if self._clock() >= self._warn_at + WARN_S:
            self._warn_at = self._clock()
            logger.warning(
                "invalid entry ignored in the shared cache in Redis, key %s: %s; if this repeats, another client writes these "
                "keys: restrict write access to this Redis",
                key.decode(),
                error,
            )

    def _keep(self, name: str, entry: Entry) -> None:
        """Write an entry; whoever asked does not wait for it."""
        task = asyncio.ensure_future(self._put(name, entry))
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    async def _put(self, name: str, entry: Entry) -> None:
        if self._clock() < self._away_until:
            return
        tag, key = self._place(name)
        ttl_ms = round(self._ttl_s * 1000 * random.uniform(0.9, 1.1))
        try:
            await self._store.call(tag, "SET", key, self._seal.seal(name.encode(), entry), "PX", str(ttl_ms))
        except StoreUnavailable as error:
            self._failed(error)

    def _place(self, name: str) -> tuple[bytes, bytes]:
        """The hash tag and the key of an entry. The tag has no part of the name that could be a brace."""
        tag = hashlib.blake2b(name.encode(), digest_size=12).hexdigest().encode()
        return tag, b"tgc:{%b}%b" % (tag, self._form.encode())

    def _failed(self, error: StoreUnavailable) -> None:
        if self._clock() >= self._away_until:
            self.errors += 1
            logger.debug("the shared cache does not answer: %s", error)
        self._away_until = self._clock() + AWAY_S
