"""From the settings to the catalog: databases, the shared cache, and the channel that announces changes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from tidegate.catalog.blocks import Blocks
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.caller_tokens import CallerTokens
from tidegate.catalog.changes import CALLER_TOKEN, KEY, NONE, TIER, Item
from tidegate.catalog.follower import Channel
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.database import DatabaseOptions
from tidegate.catalog.sql.engine import is_postgres
from tidegate.catalog.sql.key_hash import settle_key_hash
from tidegate.counters import CounterStore
from tidegate.counters.crossings import CrossingWatch
from tidegate.counters.factory import guard_of
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.channel import RedisChannel
from tidegate.counters.redis.store import RedisCounters
from tidegate.doors.callers_auth import CallersAuth, CertificateAuth, TokenAuth
from tidegate.errors import CatalogUnavailable, SettingsError
from tidegate.notifications.notifier import Notifier, NotifierOptions
from tidegate.policy.key_hash import key_hash_of, use_key_hash
from tidegate.policy.notify import NotifyTarget
from tidegate.settings import CatalogSettings, Settings
from tidegate.url_parts import scheme_of

logger = logging.getLogger(__name__)


async def _open(settings: Settings, options: DatabaseOptions) -> SqlCatalog:
    """Open the database, and hash API keys as its own were; `SettingsError` if the settings say otherwise."""
    key_hash = key_hash_of(settings.keys.hash, settings.keys.pepper)
    use_key_hash(key_hash)
    catalog = await SqlCatalog.open(settings.catalog.url, options)
    try:
        await settle_key_hash(catalog.database, key_hash)
    except BaseException:
        await catalog.close()
        raise
    return catalog


async def open_catalog(settings: Settings, channel: Channel | None = None) -> SqlCatalog:
    """Open the catalog.

    Args:
        channel: where its changes are announced.

    Raises:
        SettingsError: if a database cannot be opened, or its API keys were hashed in another way than `[keys]` says.
    """
    catalog = await _open(settings, database_options(settings.catalog))
    if channel is not None:
        catalog.database.announce = channel.announce
    return catalog


@contextlib.asynccontextmanager
async def opened_catalog(settings: Settings) -> AsyncIterator[SqlCatalog]:
    """The catalog for a command that ends soon: what it changes is announced, and it reads from the primary alone.

    Raises:
        SettingsError: if the database cannot be opened, or its API keys were hashed in another way than `[keys]` says.
    """
    store = None
    if is_postgres(settings.catalog.url) and scheme_of(settings.counters.url).startswith("redis"):
        # Connects at the first announcement.
        store = RedisCounters(settings.counters.url, settings.counters.timeout_ms / 1000)
    catalog = await _open(settings, DatabaseOptions())
    if store is not None:
        catalog.database.announce = RedisChannel(store).announce
    try:
        yield catalog
    finally:
        await catalog.close()
        if store is not None:
            await store.close()


def drop_leases_on_change(cached: CachedCatalog, counters: CounterStore) -> None:
    """Give up leases whose limits or API key a change of the catalog touched, as it is read: within a second everywhere.

    Args:
        cached: passes the changes on.
        counters: the store; nothing happens if it leases nothing.
    """
    if not isinstance(counters, LeasedCounters):
        return

    def changed(items: Sequence[Item]) -> None:
        tiers = {name for kind, name in items if kind == TIER}
        # A key's counters are named by its id, the first 24 digits of its digest.
        keys = {f"k:{name[:24]}" for kind, name in items if kind == KEY}
        if any(kind not in (TIER, KEY, NONE, CALLER_TOKEN) for kind, _ in items):
            counters.drop()
        elif tiers or keys:
            counters.drop(lambda limits, subject: limits.tier in tiers or subject in keys)

    cached.on_change = changed


def open_channel(settings: Settings, store: RedisCounters | None) -> Channel | None:
    """Where changes of the catalog are announced: Redis where there is one, else PostgreSQL.

    Args:
        store: the Redis of the counters; None where they are in memory.

    Returns:
        The channel, which connects when a listener starts; None for SQLite, which is polled at no cost.

    Raises:
        SettingsError: if the catalog's URL is not understood.
    """
    if not is_postgres(settings.catalog.url):
        return None
    if store is not None:
        return RedisChannel(store)
    # Imported here: not needed with Redis.
    from tidegate.catalog.sql.postgres_channel import PostgresChannel

    return PostgresChannel(settings.catalog.url, settings.catalog.timeout_s)


async def share_catalog(settings: Settings, catalog: SqlCatalog, store: RedisCounters | None) -> SharedCatalog | None:
    """The cache that instances share, where there is a Redis for it, and a database that is worth it.

    Args:
        catalog: where policy lives.
        store: the Redis of the counters; None where they are in memory.

    Returns:
        The catalog with the cache; None without Redis or with SQLite, whose local file is faster than Redis.

    Raises:
        CatalogUnavailable: if the cache's secret is kept in the database and it does not answer.
    """
    if store is None or not is_postgres(settings.catalog.url):
        return None
    given = settings.cache.secret
    secret = given.encode() if given else await catalog.cache_secret()
    return SharedCatalog(catalog, store, secret, settings.cache.l2_ttl_s)


async def open_blocks(settings: Settings, catalog: SqlCatalog, cached: CachedCatalog) -> Blocks:
    """Read all blocks.

    Args:
        catalog: where the blocks are stored.
        cached: passes the changes of the catalog on to the blocks: `cached.blocks`, whose `run` keeps them up to date.

    Raises:
        CatalogUnavailable: if they cannot be read.
    """
    blocks = Blocks(catalog, cached.access.replace_blocks, settings.cache.l1_ttl_s)
    await blocks.load()
    cached.blocks = blocks
    return blocks


async def open_notifier(
    settings: Settings,
    catalog: SqlCatalog,
    cached: CachedCatalog,
    counters: CounterStore,
    when_needed: Callable[[Notifier], None],
) -> Notifier:
    """Notifications of this process; see `Notifier.write` and `Notifier.deliver`.

    Args:
        catalog: where notifications wait for delivery.
        cached: has the active policy.
        counters: the store, whose charges are watched.
        when_needed: callback run once, when there are targets for the first time.

    Returns:
        The notifier, with the thresholds of the active policy.
    """
    guard = guard_of(counters)

    def watch(found: CrossingWatch | None) -> None:
        if guard is not None:
            guard.store.watch = found
        elif isinstance(counters, MemoryCounters):
            counters.watch = found

    async def read_targets() -> Sequence[NotifyTarget]:
        return (await cached.caller_policy()).notify

    given = settings.notifications
    options = NotifierOptions(given.retry_s, given.give_up_s, given.timeout_s, given.max_pending, given.keep_days)
    notifier = Notifier(catalog.database, read_targets, watch, options)
    notifier.when_needed = lambda: when_needed(notifier)
    try:
        await notifier.load_targets()
    except CatalogUnavailable as error:
        logger.warning("the targets of notifications are not known yet, retrying: %s", error.message)
    return notifier


async def open_callers_auth(settings: Settings, catalog: SqlCatalog, cached: CachedCatalog) -> CallersAuth | None:
    """Who may call the data plane.

    Args:
        catalog: where the tokens are stored.
        cached: passes the changes of the catalog on to the tokens, if there are any: `cached.caller_tokens`, whose `run` keeps
            them up to date.

    Returns:
        What decides it; None if anyone may.

    Raises:
        CatalogUnavailable: if the tokens cannot be loaded.
    """
    auth = settings.callers_auth
    if auth.mode == "mtls":
        return CertificateAuth(auth.names)
    if auth.mode != "token":
        return None
    cache = settings.cache
    tokens = CallerTokens(catalog, cache.l1_ttl_s, cache.l1_ttl_s + cache.stale_if_error_s)
    await tokens.load()
    cached.caller_tokens = tokens
    return TokenAuth(auth.header, tokens)


def database_options(settings: CatalogSettings) -> DatabaseOptions:
    """How the catalog's databases are used."""
    return DatabaseOptions(settings.replicas, settings.pool_size, settings.timeout_s, settings.max_replica_lag_s)


def require_shared_counters(settings: Settings) -> None:
    """Refuse several workers with `memory://`, where each would count separately.

    Raises:
        SettingsError: if so.
    """
    if settings.server.workers > 1 and settings.counters.url == "memory://":
        raise SettingsError(
            f"server.workers = {settings.server.workers} needs counters shared by all workers: with memory:// each "
            "worker would count separately and admit the whole limit; use server.workers = 1 or a Redis counters.url"
        )
