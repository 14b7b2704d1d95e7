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

from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import Changes
from tidegate.catalog.shared import AWAY_S, SharedCatalog
from tidegate.counters.redis.store import RedisCounters
from tidegate.limits import Limit
from tidegate.policy import ApiKey, KeyStatus, Override, Rule, Tier

TIMEOUT_S = 0.5
"""Of Redis, where it answers: the machine may be busy."""
WHOLE = msgspec.msgpack.encode([100, ApiKey("0" * 64, "free", name="näme", overrides=(Override("/a", (Limit.parse("7/day"),)),))])


class Catalog:
    """A database that knows every key and every tier, at one version, and notes what it is asked."""

    def __init__(self, version: int = 100) -> None:
        self.now = version
        self.status = KeyStatus.ACTIVE
        self.unknown: set[str] = set()
        self.asked: list[str] = []

    async def read_key(self, sha256: str, least: int = 0) -> tuple[int, ApiKey | None]:
        self.asked.append(sha256)
        limits = Override("/a", (Limit.parse("7/minute"), Limit.parse("1000/month")))
        found = ApiKey(sha256, "free", self.status, "näme", 1_900_000_000_000_000, (limits,), managed_by_file=True)
        return self.now, None if sha256 in self.unknown else found

    async def read_tier(self, name: str, least: int = 0) -> tuple[int, Tier | None]:
        self.asked.append(name)
        rules = (Rule.make("/a/*", ["3/minute", "10/day"], ["GET"]), Rule.make("/b", ["5/s burst 9"], algorithm="token_bucket"))
        return self.now, None if name in self.unknown else Tier.make(name, rules, ["100/day"])

    async def read_anonymous(self, least: int = 0) -> tuple[int, str | None]:
        self.asked.append("")
        return self.now, None

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

    async def connected(url: str, timeout_s: float = TIMEOUT_S) -> RedisCounters:
        store = RedisCounters(url, timeout_s)
        stores.append(store)
        await store.start()
        return store

    yield connected
    for store in stores:
        await store.close()


def shared(catalog: Catalog, store: RedisCounters, ttl_s: float = 300.0, clock: Any = None) -> SharedCatalog:
    source: Any = catalog
    return SharedCatalog(source, store, ttl_s) if clock is None else SharedCatalog(source, store, ttl_s, clock)


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


async def test_what_one_instance_has_read_the_others_take(redis: Any, connect: Callable[..., Any]) -> None:
    catalog = Catalog()
    first, second = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    before = keys_of(redis)
    digests, tiers = [digest() for _ in range(20)], [f"t{secrets.token_hex(8)}" for _ in range(5)]
    told = [await first.read_key(each) for each in digests], [await first.read_tier(each) for each in tiers]
    await first.settle()
    assert len(catalog.asked) == 25
    assert ([await second.read_key(each) for each in digests], [await second.read_tier(each) for each in tiers]) == told
    assert await second.api_key(digests[0]) == told[0][0][1]
    assert await second.tier(tiers[0]) == told[1][0][1]
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
        assert await cache.read_anonymous() == (100, None)
        await cache.settle()
    assert catalog.asked == [""]


async def test_an_entry_that_is_too_old_is_not_taken(redis: Any, connect: Callable[..., Any]) -> None:
    catalog = Catalog(version=100)
    first, second = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    key = digest()
    await first.read_key(key)
    await first.settle()
    catalog.now, catalog.status = 105, KeyStatus.REVOKED
    assert (await second.read_key(key, least=100))[0] == 100, "who knows of no change takes what there is"
    for _ in range(2):
        version, api_key = await second.read_key(key, least=105)
        assert version == 105
        assert api_key is not None
        assert api_key.status is KeyStatus.REVOKED
        await second.settle()
    assert len(catalog.asked) == 2, "it is written anew, and taken then"
    assert (await first.read_key(key))[0] == 105


async def test_an_entry_of_a_version_that_never_was_is_not_taken(redis: Any, connect: Callable[..., Any]) -> None:
    """A primary gave it that was lost with its last changes."""
    catalog = Catalog(version=107)
    saw_it, follows = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    key = digest()
    await saw_it.read_key(key)
    await saw_it.settle()
    catalog.now = 100
    await follows.changes(0)
    assert (await follows.read_key(key, least=100))[0] == 100
    await follows.settle()
    catalog.now = 110
    await follows.changes(100)
    catalog.now = 107
    await saw_it.read_key(key, least=107)
    await saw_it.settle()
    catalog.now = 110
    assert (await follows.read_key(key, least=100))[0] == 110


async def test_times_are_apart(redis: Any, connect: Callable[..., Any]) -> None:
    cache = shared(Catalog(), await connect(redis.url), ttl_s=100)
    before = keys_of(redis)
    await asyncio.gather(*(cache.read_key(digest()) for _ in range(300)))
    await cache.settle()
    left_ms = [server_with(redis, key).must("PTTL", key) for key in keys_of(redis) - before]
    assert len(left_ms) == 300
    # Some seconds may have passed since.
    assert 80_000 < min(left_ms) < 94_000
    assert 100_000 < max(left_ms) <= 110_000


async def test_an_entry_goes_with_its_time(connect: Callable[..., Any], redis_server: RedisServer) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(redis_server.url), ttl_s=0.2)
    key = digest()
    await cache.read_key(key)
    await cache.settle()
    async with asyncio.timeout(10):
        while cache.misses == 1:
            await asyncio.sleep(0.02)
            await cache.read_key(key)
    assert len(catalog.asked) == 2


async def test_entries_of_another_form_are_left_alone(redis: Any, connect: Callable[..., Any]) -> None:
    """As a Tidegate writes them whose records have other fields."""
    catalog = Catalog()
    ours, others = [shared(catalog, await connect(redis.url)) for _ in range(2)]
    others._form = "0" * 6
    key = digest()
    before = keys_of(redis)
    for cache in (others, ours, others, ours):
        await cache.read_key(key)
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
async def test_what_is_no_entry_is_ignored_and_written_over(
    garbage: bytes, connect: Callable[..., Any], redis_server: RedisServer
) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(redis_server.url))
    key = digest()
    _, place = cache._place(f"k:{key}")
    redis_server.must("SET", place, garbage, "EX", 60)
    for _ in range(2):
        assert (await cache.read_key(key))[1] is not None
        await cache.settle()
    assert catalog.asked == [key]
    assert (cache.hits, cache.misses, cache.errors) == (1, 1, 0)


async def test_a_key_of_another_type_costs_no_answer(connect: Callable[..., Any], redis_server: RedisServer) -> None:
    catalog, clock = Catalog(), FakeClock()
    cache = shared(catalog, await connect(redis_server.url), clock=clock)
    key, other = digest(), digest()
    _, place = cache._place(f"k:{key}")
    redis_server.must("LPUSH", place, "x")
    assert (await cache.read_key(key))[1] is not None
    clock.now += AWAY_S
    await cache.settle()
    for _ in range(2):
        await cache.read_key(other)
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
        _, api_key = await cache.read_key("0" * 64)
        assert isinstance(api_key, ApiKey)
        _, tier = await cache.read_tier("t")
        assert isinstance(tier, Tier)
        await cache.read_anonymous()
        await cache.settle()

    asyncio.run(look_up())


async def test_what_is_unknown_is_not_written(redis: Any, connect: Callable[..., Any]) -> None:
    catalog = Catalog()
    cache = shared(catalog, await connect(redis.url))
    before = keys_of(redis)
    unknown = [digest() for _ in range(50)]
    catalog.unknown = {*unknown, "none"}
    for _ in range(2):
        assert {(await cache.read_key(each))[1] for each in unknown} == {None}
        assert (await cache.read_tier("none"))[1] is None
    await cache.settle()
    assert len(catalog.asked) == 102
    assert keys_of(redis) == before


async def test_without_redis_all_goes_to_the_database_at_once(connect: Callable[..., Any], new_redis: Any) -> None:
    catalog, clock = Catalog(), FakeClock()
    redis = new_redis()
    cache = shared(catalog, await connect(redis.url), clock=clock)
    key = digest()
    await cache.read_key(key)
    await cache.settle()
    redis.kill()
    loop = asyncio.get_running_loop()
    began = loop.time()
    found = await asyncio.gather(*(cache.read_key(digest()) for _ in range(500)), cache.read_key(key))
    assert all(api_key is not None for _, api_key in found)
    assert loop.time() - began < TIMEOUT_S + 0.5
    assert len(catalog.asked) == 502
    assert cache.errors == 1, "it is one time that Redis did not answer"
    misses = cache.misses
    await cache.read_key(digest())
    assert cache.misses == misses, "it is not asked for a second"
    redis.start()
    clock.now += AWAY_S
    async with asyncio.timeout(20):
        while cache.hits == 0:
            await cache.read_key(key)
            await cache.settle()
            clock.now += AWAY_S
            await asyncio.sleep(0.02)


async def test_a_redis_that_hangs_costs_one_timeout(connect: Callable[..., Any], new_redis: Any) -> None:
    catalog, clock = Catalog(), FakeClock()
    redis = new_redis()
    timeout_s = 0.25
    async with TcpProxy(redis.port) as proxy:
        cache = shared(catalog, await connect(proxy.url, timeout_s), clock=clock)
        key = digest()
        await cache.read_key(key)
        await cache.settle()
        proxy.stall = True
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(cache.read_key(digest()) for _ in range(300)))
        first_s = loop.time() - began
        assert timeout_s * 0.9 < first_s < timeout_s + 1
        taken = proxy.bytes_to_server
        began = loop.time()
        for _ in range(300):
            await cache.read_key(digest())
        assert loop.time() - began < timeout_s, "nobody else waits for it"
        assert (proxy.bytes_to_server, cache.errors) == (taken, 1)
        assert len(catalog.asked) == 601
        proxy.stall = False
        clock.now += AWAY_S
        async with asyncio.timeout(20):
            while cache.hits == 0:
                await cache.read_key(key)
                await cache.settle()
                clock.now += AWAY_S
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
