"""The gate and the catalog's cache: who is let in, what is observed, what happens when a part fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tests.cases.doors import EXPIRED, FREE, POLICY, REVOKED
from tests.conftest import Clock
from tidegate.catalog.cached import MAX_UNKNOWN, CachedCatalog
from tidegate.catalog.policy_file import PolicyCatalog, parse_policy
from tidegate.counters import Charge
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision, Observation
from tidegate.errors import BadRequest, CatalogUnavailable, InvalidApiKey, MissingApiKey, StoreUnavailable, TidegateError
from tidegate.gate import Gate
from tidegate.keys import hash_api_key, make_api_key
from tidegate.policy import ApiKey, Tier


class CountingCatalog(PolicyCatalog):
    """A real catalog that counts what it is asked and can be told to fail."""

    def __init__(self, text: str = POLICY) -> None:
        super().__init__(parse_policy(text))
        self.asked: list[str] = []
        self.failing = False
        self.delay_s = 0.0

    async def api_key(self, sha256: str) -> ApiKey | None:
        self.asked.append("key")
        await asyncio.sleep(self.delay_s)
        if self.failing:
            raise CatalogUnavailable("away")
        return await super().api_key(sha256)

    async def tier(self, name: str) -> Tier | None:
        self.asked.append("tier")
        if self.failing:
            raise CatalogUnavailable("away")
        return await super().tier(name)


class Seconds:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_thousand_misses_make_one_query() -> None:
    catalog = CountingCatalog()
    catalog.delay_s = 0.01
    cached = CachedCatalog(catalog)
    found = await asyncio.gather(*(cached.caller(hash_api_key(FREE)) for _ in range(1000)))
    assert all(caller is not None and caller.tier.tier.name == "free" for caller in found)
    assert catalog.asked == ["key", "tier"]


async def test_a_waiter_that_gives_up_cancels_nobody() -> None:
    catalog = CountingCatalog()
    catalog.delay_s = 0.05
    cached = CachedCatalog(catalog)
    first = asyncio.create_task(cached.caller(hash_api_key(FREE)))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(cached.caller(hash_api_key(FREE)))
    await asyncio.sleep(0)
    first.cancel()
    assert await second is not None
    assert catalog.asked.count("key") == 1


async def test_entries_live_their_time_and_stale_ones_stand_in() -> None:
    catalog, clock = CountingCatalog(), Seconds()
    cached = CachedCatalog(catalog, l1_ttl_s=60, stale_if_error_s=100, clock=clock)
    digest = hash_api_key(FREE)
    await cached.caller(digest)
    clock.now += 50
    await cached.caller(digest)
    assert catalog.asked.count("key") == 1
    clock.now += 20
    await cached.caller(digest)
    assert catalog.asked.count("key") == 2
    catalog.failing = True
    clock.now += 70
    assert await cached.caller(digest) is not None, "past its time, but the catalog fails"
    assert cached.stale == 1
    clock.now += 100
    with pytest.raises(CatalogUnavailable):
        await cached.caller(digest)
    with pytest.raises(CatalogUnavailable):
        await cached.caller("0" * 64)


async def test_unknown_keys_are_remembered_for_seconds_and_bounded() -> None:
    catalog, clock = CountingCatalog(), Seconds()
    cached = CachedCatalog(catalog, clock=clock)
    for _ in range(3):
        assert await cached.caller("0" * 64) is None
    assert catalog.asked.count("key") == 1
    clock.now += 6
    await cached.caller("0" * 64)
    assert catalog.asked.count("key") == 2
    await cached.caller(hash_api_key(FREE))
    for number in range(MAX_UNKNOWN + 500):
        await cached.caller(f"{number:064x}")
    assert len(cached) == MAX_UNKNOWN + 1
    asked = len(catalog.asked)
    assert await cached.caller(hash_api_key(FREE)) is not None
    assert len(catalog.asked) == asked, "a flood of unknown keys pushes no known one out"


async def test_known_keys_are_bounded() -> None:
    keys = [make_api_key() for _ in range(50)]
    text = '[[tiers]]\nname = "t"\n' + "".join(f'[[api_keys]]\nkey = "{key}"\ntier = "t"\n' for key in keys)
    cached = CachedCatalog(CountingCatalog(text), max_keys=10)
    for key in keys:
        assert await cached.caller(hash_api_key(key)) is not None
        assert len(cached) <= 10


async def test_invalidation_also_reaches_what_is_being_loaded() -> None:
    catalog = CountingCatalog()
    catalog.delay_s = 0.02
    cached = CachedCatalog(catalog)
    loading = asyncio.create_task(cached.caller(hash_api_key(FREE)))
    await asyncio.sleep(0.005)
    catalog.replace(parse_policy(POLICY.replace(FREE, "demo-free-key-0002")))
    cached.invalidate()
    await loading
    assert await cached.caller(hash_api_key(FREE)) is None
    assert await cached.caller(hash_api_key("demo-free-key-0002")) is not None


async def test_mistyped_keys_cost_no_look_up() -> None:
    catalog = CountingCatalog()
    gate = Gate(CachedCatalog(catalog), MemoryCounters())
    key = make_api_key()
    for wrong in (key[:-1] + ("0" if key[-1] != "0" else "1"), "tg_", "short", "with space in the key", "ä" * 20, "k" * 129):
        with pytest.raises(InvalidApiKey, match="mistyped"):
            await gate.check(Check.of("/a", api_key=wrong))
    assert catalog.asked == []
    with pytest.raises(InvalidApiKey, match="unknown"):
        await gate.check(Check.of("/a", api_key=key))


async def test_without_key_and_without_anonymous_tier() -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy('[[tiers]]\nname = "t"'))), MemoryCounters())
    with pytest.raises(MissingApiKey, match="X-API-Key"):
        await gate.check(Check.of("/a", ip="1.2.3.4"))


async def test_rules_by_ip_need_one(gate: Gate) -> None:
    with pytest.raises(BadRequest, match="ip is needed"):
        await gate.check(Check.of("/login", "POST", FREE))
    with pytest.raises(BadRequest, match="ip is needed"):
        await gate.check(Check.of("/api/v1/a"))
    assert (await gate.check(Check.of("/elsewhere"))).allowed, "where nothing is counted, none is needed"


async def test_everything_is_observed_once(gate: Gate, seen: list[Observation]) -> None:
    for _ in range(2):
        await gate.check(Check.of("/watched", api_key=FREE))
    for key in (REVOKED, EXPIRED, "nobody-knows-this-key"):
        with pytest.raises(TidegateError):
            await gate.check(Check.of("/a", api_key=key))
    await gate.check_many([Check.of("/watched", api_key=FREE), Check.of("/watched", api_key=REVOKED)])
    assert [(each.error, each.shadow_denied) for each in seen] == [
        (None, ()),
        (None, ("/watched shadow",)),
        ("API_KEY_REVOKED", ()),
        ("API_KEY_EXPIRED", ()),
        ("INVALID_API_KEY", ()),
        (None, ("/watched shadow",)),
        ("API_KEY_REVOKED", ()),
    ]
    assert all(each.latency_ns > 0 for each in seen)
    assert all(each.subject is None or FREE not in each.subject for each in seen), "no key is handed to telemetry"


async def test_a_shadow_rule_alone_is_observed_too(seen: list[Observation]) -> None:
    text = """
[[tiers]]
name = "t"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["1/day"]
  mode = "shadow"
[[api_keys]]
key = "demo-free-key-0001"
tier = "t"
"""
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), MemoryCounters(), seen.append)
    for _ in range(2):
        decision = await gate.check(Check.of("/x", api_key=FREE))
        assert (decision.allowed, decision.limit, decision.tier) == (True, None, "t")
    assert [each.shadow_denied for each in seen] == [(), ("/* shadow",)]


async def test_a_batch_is_decided_in_order_with_one_call(clock: Clock) -> None:
    calls: list[int] = []

    class Counted(MemoryCounters):
        async def charge(self, charges: Sequence[Charge]) -> list[Decision]:
            calls.append(len(charges))
            return await super().charge(charges)

    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), Counted(clock=clock))
    checks = [Check.of("/api/v1/a", api_key=FREE)] * 5 + [Check.of("/api/v1/a", api_key=REVOKED), Check.of("/x", api_key=FREE)]
    answers = await gate.check_many(checks)
    assert calls == [6]
    assert [answer.allowed if isinstance(answer, Decision) else answer.code for answer in answers] == [
        *[True] * 3,
        *[False] * 2,
        "API_KEY_REVOKED",
        True,
    ]
    assert await gate.check_many([]) == []


async def test_a_store_that_fails_fails_the_checks_that_need_it() -> None:
    class Failing(MemoryCounters):
        async def charge(self, charges: Sequence[Charge]) -> list[Decision]:
            raise StoreUnavailable("away")

    seen: list[Observation] = []
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), Failing(), seen.append)
    with pytest.raises(StoreUnavailable):
        await gate.check(Check.of("/api/v1/a", api_key=FREE))
    answers: list[Any] = await gate.check_many([Check.of("/api/v1/a", api_key=FREE), Check.of("/elsewhere", ip="1.1.1.1")])
    assert isinstance(answers[0], StoreUnavailable)
    assert answers[1].allowed
    assert [each.error for each in seen] == ["STORE_UNAVAILABLE", "STORE_UNAVAILABLE", None]


async def test_a_policy_in_force_keeps_what_was_consumed(clock: Clock) -> None:
    catalog = PolicyCatalog(parse_policy(POLICY))
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters(clock=clock))
    for _ in range(2):
        await gate.check(Check.of("/api/v1/a", api_key=FREE))
    catalog.replace(parse_policy(POLICY.replace("3/minute", "10/minute")))
    cached.invalidate()
    assert (await gate.check(Check.of("/api/v1/a", api_key=FREE))).remaining == 7
