"""The cache that instances share, in real Redis, Cluster and Sentinel: what lies there, what is taken, and life without it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.moments import PATIENCE_S
from tests.redis_deadline import NEVER_S, set_deadline
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import Changes
from tidegate.catalog.shared import RETRY_S, WARN_S, SharedCatalog
from tidegate.catalog.shared_entries import CallersEntry, EntrySeal, KeyEntry, TierEntry
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.limits import Limit
from tidegate.policy.model import ApiKey, KeyStatus, Tier
from tidegate.policy.overrides import Override
from tidegate.policy.rules import Rule
from tidegate.server.wiring import share_catalog
from tidegate.settings_loader import load_settings

SECRET = b"secret of this test's catalog"
WHOLE = EntrySeal(SECRET).seal(
    b"k:" + b"0" * 64, KeyEntry(100, ApiKey("0" * 64, "free", name="näme", overrides=(Override("/a", (Limit.parse("7/day"),)),)))
)


class Catalog:
    """A database that knows every key and every tier, at one version, and notes what it is asked."""

    def __init__(self, version: int = 100) -> None:
        self.now = version
        self.status = KeyStatus.ACTIVE
        self.unknown: set[str] = set()
        self.asked: list[str] = []

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        self.asked.append(sha256)
        limits = Override("/a", (Limit.parse("7/minute"), Limit.parse("1000/month")))
        found = ApiKey(sha256, "free", self.status, "näme", 1_900_000_000_000_000, (limits,), managed_by_file=True)
        return self.now, None if sha256 in self.unknown else found

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
        self.asked.append(name)
        rules = (Rule.make("/a/*", ["3/minute", "10/day"], ["GET"]), Rule.make("/b", ["5/s burst 9"], algorithm="token_bucket"))
        return self.now, None if name in self.unknown else Tier.make(name, rules, ["100/day"])

    async def caller_policy(self, min_version: int = 0) -> tuple[int, CallerPolicy]:
        self.asked.append("")
        return self.now, CallerPolicy()

    async def changes(self, since: int) -> Changes:
        return Changes(self.now, min(since, self.now), versions=(min(since, self.now), self.now))


class FakeClock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["server", "cluster", "sentinel"])
def redis(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"redis_{request.param}")


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Any]]:
    """Connects to a URL as an instance does."""
    stores: list[RedisCounters] = []

    async def connected(url: str, timeout_s: float = NEVER_S) -> RedisCounters:
        store = RedisCounters(url, timeout_s)
        stores.append(store)
        await store.start()
        return store

    yield connected
    for store in stores:
        await store.close()


class Counted:
    """A store that counts its calls."""

    def __init__(self, store: RedisCounters) -> None:
        self.calls = 0
        self._store = store

    async def call(self, tag: bytes, *parts: str | bytes) -> Any:
        self.calls += 1
        return await self._store.call(tag, *parts)


def shared(catalog: Catalog, store: RedisCounters | Counted, ttl_s: float = 300.0, clock: Any = None) -> SharedCatalog:
    source: Any = catalog
    return SharedCatalog(source, store, SECRET, ttl_s) if clock is None else SharedCatalog(source, store, SECRET, ttl_s, clock)


def digest() -> str:
    return secrets.token_hex(32)


def servers_of(redis: Any) -> list[RedisServer]:
    """Those that hold keys."""
    if isinstance(redis, RedisServer):
        return [redis]
    return redis.masters() if hasattr(redis, "masters") else [redis.master()]  # type: ignore[no-any-return]


def keys_of(redis: Any) -> set[bytes]:
    return {key for server in servers_of(redis) for key in server.must("KEYS", "*")}


def server_with(redis: Any, key: bytes) -> RedisServer:
    return next(server for server in servers_of(redis) if server.call("EXISTS", key) == 1)


async def test_instances_use_entries_of_each_other(redis: Any, connect: Callable[..., Any]) -> None:
    catalog = Catalog()
    first, second = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    before = keys_of(redis)
    digests, tiers = [digest() for _ in range(20)], [f"t{secrets.token_hex(8)}" for _ in range(5)]
    told = [await first.api_key(each) for each in digests], [await first.tier(each) for each in tiers]
    await first.settle()
    assert len(catalog.asked) == 25
    assert ([await second.api_key(each) for each in digests], [await second.tier(each) for each in tiers]) == told
    assert (await second.api_key(digests[0]))[1] == told[0][0][1]
    assert (await second.tier(tiers[0]))[1] == told[1][0][1]
    assert len(catalog.asked) == 25
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 25, 27, 0)
    made = keys_of(redis) - before
    assert len(made) == 25
    assert all(key.startswith(b"tgc:{") for key in made)
    assert all(server_with(redis, key).must("PTTL", key) > 0 for key in made), "everything expires"
    assert all(name.encode() not in key for key in made for name in digests + tiers)


async def test_that_there_is_no_anonymous_tier_is_kept_too(connect: Callable[..., Any], new_redis: Any) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(new_redis().url))
    for _ in range(2):
        assert await cache.caller_policy() == (100, CallerPolicy())
        await cache.settle()
    assert catalog.asked == [""]


async def test_an_entry_of_an_older_version_is_ignored(redis: Any, connect: Callable[..., Any]) -> None:
    catalog = Catalog(version=100)
    first, second = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    key = digest()
    await first.api_key(key)
    await first.settle()
    catalog.now, catalog.status = 105, KeyStatus.REVOKED
    assert (await second.api_key(key, min_version=100))[0] == 100, "who knows of no change takes what there is"
    for _ in range(2):
        version, api_key = await second.api_key(key, min_version=105)
        assert version == 105
        assert api_key is not None
        assert api_key.status is KeyStatus.REVOKED
        await second.settle()
    assert len(catalog.asked) == 2, "it is written anew, and taken then"
    assert (await first.api_key(key))[0] == 105


async def test_an_entry_of_an_unknown_version_is_ignored(redis: Any, connect: Callable[..., Any]) -> None:
    """A primary gave it that was lost with its last changes."""
    catalog = Catalog(version=107)
    saw_it, follows = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    key = digest()
    await saw_it.api_key(key)
    await saw_it.settle()
    catalog.now = 100
    await follows.changes(0)
    assert (await follows.api_key(key, min_version=100))[0] == 100
    await follows.settle()
    catalog.now = 110
    await follows.changes(100)
    catalog.now = 107
    await saw_it.api_key(key, min_version=107)
    await saw_it.settle()
    catalog.now = 110
    assert (await follows.api_key(key, min_version=100))[0] == 110


async def test_times_are_apart(redis: Any, connect: Callable[..., Any]) -> None:
    cache = shared(Catalog(), await connect(redis.url), ttl_s=100)
    before = keys_of(redis)
    await asyncio.gather(*(cache.api_key(digest()) for _ in range(300)))
    await cache.settle()
    left_ms = [server_with(redis, key).must("PTTL", key) for key in keys_of(redis) - before]
    assert len(left_ms) == 300
    # Some seconds may have passed since.
    assert 80_000 < min(left_ms) < 94_000
    assert 100_000 < max(left_ms) <= 110_000


async def test_an_entry_expires(connect: Callable[..., Any], redis_server: RedisServer) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(redis_server.url), ttl_s=0.2)
    key = digest()
    await cache.api_key(key)
    await cache.settle()
    async with asyncio.timeout(PATIENCE_S):
        while cache.misses == 1:
            await asyncio.sleep(0.02)
            await cache.api_key(key)
    assert len(catalog.asked) == 2


async def test_entries_of_another_format_are_not_changed(redis: Any, connect: Callable[..., Any]) -> None:
    """As a Tidegate writes them whose records have other fields."""
    catalog = Catalog()
    ours, others = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    others._form = "0" * 6
    key = digest()
    before = keys_of(redis)
    for cache in (others, ours, others, ours):
        await cache.api_key(key)
        await cache.settle()
    assert len(catalog.asked) == 2
    made = keys_of(redis) - before
    assert len(made) == 2
    assert len({key.partition(b"}")[0] for key in made}) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xc1",
        b"text",
        b"\x90",
        b"\x91\x64",
        b"\xff" * 1000,
        msgspec.msgpack.encode([100, ["free", (), (), False]]),
        msgspec.msgpack.encode(["100", {}]),
        b"\x92\x64" * 10_000,
        WHOLE.replace(b"free", b"fr\xff\xfe"),
    ],
)
async def test_invalid_entries_are_ignored_and_overwritten(
    garbage: bytes, connect: Callable[..., Any], redis_server: RedisServer
) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(redis_server.url))
    key = digest()
    _, place = cache._tag_and_key(f"k:{key}")
    redis_server.must("SET", place, garbage, "EX", 60)
    for _ in range(2):
        assert (await cache.api_key(key))[1] is not None
        await cache.settle()
    assert catalog.asked == [key]
    assert (cache.hits, cache.misses, cache.errors, cache.refused) == (1, 1, 0, 1)


async def test_a_key_of_another_type_is_replaced_and_the_cache_stays_on(
    connect: Callable[..., Any], redis_server: RedisServer
) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(redis_server.url))
    key, other = digest(), digest()
    _, place = cache._tag_and_key(f"k:{key}")
    redis_server.must("RPUSH", place, "not", "an", "entry")
    for each in (key, other, key, other):
        assert (await cache.api_key(each))[1] is not None
        await cache.settle()
    assert catalog.asked == [key, other]
    assert (cache.hits, cache.misses, cache.errors, cache.refused) == (2, 2, 0, 1)


FREE = Rule.make("/a", ["5/minute"])


def forged(entry: ApiKey | Tier | str | None, secret: bytes, place: bytes, version: int = 100) -> bytes:
    """An entry as somebody writes it who knows its form; sealed, as far as the secret that they know allows."""
    made = (
        KeyEntry(version, entry)
        if isinstance(entry, ApiKey)
        else TierEntry(version, entry)
        if isinstance(entry, Tier)
        else CallersEntry(version, entry)
    )
    return EntrySeal(secret).seal(place, made)


@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("k", lambda digest: ApiKey(digest, "premium")),
        ("k", lambda digest: ApiKey(digest, "free", KeyStatus.ACTIVE, expires_at_us=None)),
        ("t", lambda _: Tier("free", (), ())),
        ("a", lambda _: "premium"),
    ],
)
async def test_forged_entries_in_redis_are_ignored(
    name: str, forge: Callable[[str], Any], connect: Callable[..., Any], redis_server: RedisServer
) -> None:
    """A key raised to another tier or brought back, a tier without its limits, an anonymous tier where there is none."""
    key = digest()
    what = {"k": f"k:{key}", "t": "t:free", "a": "a"}[name]

    async def read(cache: SharedCatalog) -> Any:
        if name == "k":
            return (await cache.api_key(key))[1]
        return (await cache.tier("free"))[1] if name == "t" else (await cache.caller_policy())[1]

    cache = shared(Catalog(), await connect(redis_server.url))
    told = await read(cache)
    await cache.settle()
    _, place = cache._tag_and_key(what)
    sealed = redis_server.must("GET", place)
    entry = forge(key)
    plain = msgspec.msgpack.encode([100, entry])
    for raw in (plain, bytes(32) + plain, forged(entry, b"another secret", what.encode()), sealed[:32] + plain):
        assert raw != sealed
        redis_server.must("SET", place, raw, "EX", 60)
        before = cache.refused
        assert await read(cache) == told
        await cache.settle()
        assert cache.refused == before + 1
    assert redis_server.must("GET", place) == sealed, "it is written over"
    redis_server.must("DEL", place)


async def test_an_entry_copied_to_another_name_is_ignored(connect: Callable[..., Any], redis_server: RedisServer) -> None:
    """Sealed by ourselves, but of another key, another tier, or another kind of thing."""
    catalog = Catalog()
    cache = shared(catalog, await connect(redis_server.url))
    mine, paid = digest(), digest()
    await cache.api_key(paid)
    await cache.tier("paid")
    await cache.settle()
    _, paid_place = cache._tag_and_key(f"k:{paid}")
    _, my_place = cache._tag_and_key(f"k:{mine}")
    redis_server.must("SET", my_place, redis_server.must("GET", paid_place), "EX", 60)
    found = (await cache.api_key(mine))[1]
    assert found is not None
    assert found.sha256 == mine
    _, tier_place = cache._tag_and_key("t:moved")
    redis_server.must("SET", tier_place, redis_server.must("GET", cache._tag_and_key("t:paid")[1]), "EX", 60)
    tier = (await cache.tier("moved"))[1]
    assert tier is not None
    assert tier.name == "moved"
    assert cache.refused == 2
    await cache.settle()


@pytest.mark.parametrize(
    ("what", "entry"),
    [
        ("k:" + "0" * 64, ApiKey("1" * 64, "free")),
        ("k:" + "0" * 64, ApiKey("0" * 64, "")),
        ("k:" + "0" * 64, ApiKey("0" * 64, "free", counts_as="i:203.0.113.7")),
        ("k:" + "0" * 64, ApiKey("0" * 64, "free", overrides=(Override("", (Limit(-5, 60_000_000),)),))),
        ("k:" + "0" * 64, ApiKey("0" * 64, "free", overrides=(Override("", (Limit(5, 0),)),))),
        ("t:t", Tier("other")),
        ("t:t", Tier("t", (), (Limit(5, 60_000_000, calendar_month=True),))),
        ("t:t", Tier("t", (), (Limit(5, 1_500_000),))),
        ("t:t", Tier("t", (msgspec.structs.replace(FREE, limits=()),))),
        ("t:t", Tier("t", (msgspec.structs.replace(FREE, limits=(Limit(0, 60_000_000),)),))),
        ("t:t", Tier("t", (msgspec.structs.replace(FREE, limits=(Limit(5, 60_000_000, burst=3),)),))),
        ("t:t", Tier("t", (FREE, FREE))),
        ("t:t", Tier("t", (msgspec.structs.replace(FREE, name=""),))),
    ],
)
async def test_a_sealed_entry_is_validated_as_a_row_of_the_database_is(what: str, entry: ApiKey | Tier) -> None:
    """As a fault of ours, or an instance of another version that shares the secret, may write it."""
    store: Any = Store(forged(entry, SECRET, what.encode()))
    catalog = Catalog()
    cache = shared(catalog, store)
    found = (await cache.api_key("0" * 64))[1] if what[0] == "k" else (await cache.tier("t"))[1]
    assert found is not None
    assert found != entry
    assert (cache.refused, len(catalog.asked)) == (1, 1)
    await cache.settle()


async def test_sealed_entries_are_read_back(redis: Any, connect: Callable[..., Any]) -> None:
    """Every form of limit passes its own validation."""

    class Forms(Catalog):
        async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
            rules = [
                Rule.make("/w", ["3/minute", "5/90s", "7/36h", "9/day", "11/month", "13/366d"]),
                Rule.make("/b", ["5/s burst 9"], algorithm="token_bucket"),
                Rule.make("/l", ["5/7m"], algorithm="leaky_bucket"),
                Rule.make("descriptor:a=*", ["5/day"], algorithm="sliding_log"),
            ]
            self.asked.append(name)
            return self.now, Tier.make(name, rules, ["1000000000/month"])

    catalog = Forms()
    cache = shared(catalog, await connect(redis.url))
    name = f"t{secrets.token_hex(8)}"
    told = await cache.tier(name)
    await cache.settle()
    assert await cache.tier(name) == told
    assert (cache.refused, catalog.asked) == (0, [name])


async def test_catalogs_with_other_secrets_share_a_redis_and_nothing_in_it(
    connect: Callable[..., Any], redis_server: RedisServer
) -> None:
    store = await connect(redis_server.url)
    one, other = Catalog(), Catalog(version=200)
    first = SharedCatalog(one, store, b"secret of one")  # type: ignore[arg-type]
    second = SharedCatalog(other, store, b"secret of the other")  # type: ignore[arg-type]
    key = digest()
    for _ in range(2):
        assert (await first.api_key(key))[0] == 100
        assert (await second.api_key(key))[0] == 200
        await first.settle()
        await second.settle()
    assert (one.asked, other.asked) == ([key], [key])
    assert (first.refused, second.refused) == (0, 0)


async def test_invalid_entries_are_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    store: Any = Store(b"x" * 100)
    clock = FakeClock()
    cache = shared(Catalog(), store, clock=clock)
    for _ in range(50):
        await cache.api_key("0" * 64)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    clock.now += WARN_S
    await cache.api_key("0" * 64)
    assert len(caplog.records) == 2
    assert cache.refused == 51
    await cache.settle()


async def test_a_key_of_another_type_costs_no_answer(connect: Callable[..., Any], redis_server: RedisServer) -> None:
    catalog, clock = Catalog(), FakeClock()
    cache = shared(catalog, await connect(redis_server.url), clock=clock)
    key, other = digest(), digest()
    _, place = cache._tag_and_key(f"k:{key}")
    redis_server.must("LPUSH", place, "x")
    assert (await cache.api_key(key))[1] is not None
    clock.now += RETRY_S
    await cache.settle()
    for _ in range(2):
        await cache.api_key(other)
        await cache.settle()
    assert catalog.asked == [key, other]
    redis_server.must("DEL", place)


class Store:
    """A Redis that answers one thing."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    async def call(self, tag: bytes, *parts: str | bytes) -> Any:
        return self.raw if parts[0] == "GET" else b"OK"


@given(st.binary(max_size=200) | st.tuples(st.integers(0, 120), st.binary(max_size=8)))
def test_no_bytes_whatever_break_a_look_up(drawn: bytes | tuple[int, bytes]) -> None:
    if isinstance(drawn, tuple):
        at, other = drawn
        raw = WHOLE[:at] + other + WHOLE[at + len(other) :]
    else:
        raw = drawn

    async def look_up() -> None:
        store: Any = Store(raw)
        cache = shared(Catalog(), store)
        _, api_key = await cache.api_key("0" * 64)
        assert isinstance(api_key, ApiKey)
        assert cache.hits == (raw == WHOLE), "nothing is taken that was changed, whatever it still reads as"
        _, tier = await cache.tier("t")
        assert isinstance(tier, Tier)
        await cache.caller_policy()
        await cache.settle()

    asyncio.run(look_up())


async def test_what_is_unknown_is_not_written(redis: Any, connect: Callable[..., Any]) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(redis.url))
    before = keys_of(redis)
    unknown = [digest() for _ in range(50)]
    catalog.unknown = {*unknown, "none"}
    for _ in range(2):
        assert {(await cache.api_key(each))[1] for each in unknown} == {None}
        assert (await cache.tier("none"))[1] is None
    await cache.settle()
    assert len(catalog.asked) == 102
    assert keys_of(redis) == before


async def test_without_redis_all_look_ups_go_to_the_database(connect: Callable[..., Any], new_redis: Any) -> None:
    catalog, clock = Catalog(), FakeClock()
    redis = new_redis()
    store = Counted(await connect(redis.url))
    cache = shared(catalog, store, clock=clock)
    key = digest()
    await cache.api_key(key)
    await cache.settle()
    redis.kill()
    # Whoever waited for Redis would wait ten times as long.
    async with asyncio.timeout(PATIENCE_S):
        found = await asyncio.gather(*(cache.api_key(digest()) for _ in range(500)), cache.api_key(key))
    assert all(api_key is not None for _, api_key in found)
    assert len(catalog.asked) == 502
    assert cache.errors == 1, "it is one time that Redis did not answer"
    calls = store.calls
    await cache.api_key(digest())
    assert store.calls == calls, "it is not asked for a second"
    redis.start()
    clock.now += RETRY_S
    async with asyncio.timeout(PATIENCE_S):
        while cache.hits == 0:
            await cache.api_key(key)
            await cache.settle()
            clock.now += RETRY_S
            await asyncio.sleep(0.02)


async def test_a_redis_that_hangs_costs_one_timeout(connect: Callable[..., Any], new_redis: Any) -> None:
    catalog, clock = Catalog(), FakeClock()
    redis = new_redis()
    async with TcpProxy(redis.port) as proxy:
        connected = await connect(proxy.url)
        store = Counted(connected)
        cache = shared(catalog, store, clock=clock)
        key = digest()
        await cache.api_key(key)
        await cache.settle()
        calls = store.calls
        set_deadline(connected, 0.25)
        proxy.stall = True
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(cache.api_key(digest()) for _ in range(300)))
        assert (store.calls - calls, cache.errors) == (300, 1), "all wait for one timeout, together"
        for _ in range(300):
            await cache.api_key(digest())
        assert (store.calls - calls, cache.errors) == (300, 1), "nobody else asks it"
        assert len(catalog.asked) == 601
        proxy.stall = False
        set_deadline(connected, NEVER_S)
        clock.now += RETRY_S
        async with asyncio.timeout(PATIENCE_S):
            while cache.hits == 0:
                await cache.api_key(key)
                await cache.settle()
                clock.now += RETRY_S
                await asyncio.sleep(0.02)
    assert cache.errors >= 1


async def test_both_levels_share_a_thousand_misses(redis: Any, connect: Callable[..., Any]) -> None:
    """A cold instance beside a warm one: no query; a cold one alone: one query for the key and one for its tier."""
    catalog = Catalog()
    key = digest()
    for queries in (2, 0):
        catalog.asked.clear()
        cache = shared(catalog, await connect(redis.url))
        cached = CachedCatalog(cache)
        found = await asyncio.gather(*(cached.caller(key) for _ in range(1000)))
        assert all(caller is not None for caller in found)
        await cache.settle()
        # The tier is one that all tests of this file share.
        assert catalog.asked.count(key) == queries // 2
        assert len(catalog.asked) <= queries
        assert (cache.hits + cache.misses) == 2


async def test_instances_of_one_database_have_one_secret_without_being_given_it(catalog_url: str) -> None:
    first, second = [await SqlCatalog.open(catalog_url) for _ in range(2)]
    version = await first.version()
    made = await asyncio.gather(first.cache_secret(), second.cache_secret())
    assert len(set(made)) == 1
    assert len(made[0]) == 64
    assert await second.cache_secret() == made[0]
    assert await first.version() == version, "no check reads it"
    await first.close()
    await second.close()


async def test_the_secret_of_the_settings_has_precedence(catalog_url: str, redis_server: RedisServer) -> None:
    catalog = await SqlCatalog.open(catalog_url)
    store = RedisCounters(redis_server.url)
    url = "postgresql://x@localhost/x"

    async def form(**environment: str) -> str:
        settings = load_settings(None, {"TIDEGATE_CATALOG__URL": url, **environment})
        made = await share_catalog(settings, catalog, store)
        assert made is not None
        return made._form

    given = {"TIDEGATE_CACHE__SECRET": "0123456789abcdef"}
    assert await form() == await form() == await form(TIDEGATE_CACHE__SECRET="")
    assert await form(**given) == await form(**given) != await form()
    await catalog.close()
    await store.close()
