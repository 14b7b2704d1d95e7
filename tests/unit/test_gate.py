"""The gate and the catalog's cache: who is let in, what is observed, what happens when a part fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tests.cases.doors import EXPIRED, FREE, OWN, POLICY, REVOKED
from tests.conftest import Clock
from tidegate.catalog import loader as loader_module
from tidegate.catalog.cached import MAX_UNKNOWN, CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters import Charge
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision, Usage
from tidegate.errors import BadRequest, CatalogUnavailable, InvalidApiKey, MissingApiKey, StoreUnavailable, TidegateError
from tidegate.gate.gate import Gate
from tidegate.gate.usage import MAX_USAGE_RULES
from tidegate.observation import Observation
from tidegate.policy.key_format import hash_api_key, make_api_key
from tidegate.policy.limits import LimitSet
from tidegate.policy.model import ApiKey, Tier
from tidegate.policy.toml_reader import parse_policy

IP, OTHER_IP = "203.0.113.7", "198.51.100.1"


class CountingCatalog(PolicyCatalog):
    """A real catalog that counts what it is asked and can be told to fail."""

    def __init__(self, text: str = POLICY) -> None:
        super().__init__(parse_policy(text))
        self.asked: list[str] = []
        self.failing = False
        self.delay_s = 0.0

    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        self.asked.append("key")
        await asyncio.sleep(self.delay_s)
        if self.failing:
            raise CatalogUnavailable("away")
        return await super().api_key(sha256)

    async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
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


async def test_entries_expire_and_stale_ones_are_served_on_errors() -> None:
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
    await gate.access.load()
    catalog.asked.clear()
    key = make_api_key()
    for wrong in (key[:-1] + ("0" if key[-1] != "0" else "1"), "tg_", "tg_" + "k" * 600):
        with pytest.raises(InvalidApiKey, match="mistyped"):
            await gate.check(Check.of("/a", api_key=wrong))
    for wrong in ("with space in the key", "ä" * 20, "k" * 513, "a\n"):
        with pytest.raises(InvalidApiKey, match="1 to 512 visible ASCII characters"):
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
        immediate = False

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
        immediate = False

        async def charge(self, charges: Sequence[Charge]) -> list[Any]:
            return [StoreUnavailable("away") for _ in charges]

    seen: list[Observation] = []
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), Failing(), seen.append)
    with pytest.raises(StoreUnavailable):
        await gate.check(Check.of("/api/v1/a", api_key=FREE))
    answers: list[Any] = await gate.check_many([Check.of("/api/v1/a", api_key=FREE), Check.of("/elsewhere", ip="1.1.1.1")])
    assert isinstance(answers[0], StoreUnavailable)
    assert answers[1].allowed
    assert [each.error for each in seen] == ["STORE_UNAVAILABLE", "STORE_UNAVAILABLE", None]


async def test_a_policy_active_keeps_what_was_consumed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "PATIENCE_S", 60.0)  # on a busy machine the old policy would rightly stand in
    catalog = PolicyCatalog(parse_policy(POLICY))
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters(clock=clock))
    for _ in range(2):
        await gate.check(Check.of("/api/v1/a", api_key=FREE))
    catalog.replace(parse_policy(POLICY.replace("3/minute", "10/minute")))
    cached.invalidate()
    assert (await gate.check(Check.of("/api/v1/a", api_key=FREE))).remaining == 7


def _left(usage: Usage) -> dict[str | None, int | None]:
    return {each.rule: each.decision.remaining for each in usage.rules}


async def test_usage_reports_every_rule_and_consumes_nothing(gate: Gate, seen: list[Observation]) -> None:
    for path, method in (
        ("/api/v1/a", "GET"),
        ("/api/v1/a", "GET"),
        ("/login", "POST"),
        ("/everyone", "GET"),
        ("/watched", "GET"),
    ):
        await gate.check(Check.of(path, method, FREE, IP))
    seen.clear()
    usage = await gate.usage(FREE, IP)
    assert await gate.usage(FREE, IP) == usage, "the clock stands and nothing was consumed"
    assert seen == [], "a question for usage is no check"
    assert (usage.tier, usage.not_counted, usage.truncated) == ("free", (), False)
    assert [(each.rule, each.endpoint, each.mode, each.subject, each.decision.remaining) for each in usage.rules] == [
        (None, None, "enforce", "api_key", 15),
        ("/everyone", "/everyone", "enforce", "tier", 1),
        ("/watched shadow", "/watched", "shadow", "api_key", 0),
        ("POST /login", "/login", "enforce", "ip", 1),
        ("/paced", "/paced", "enforce", "api_key", 1),
        ("/api/v1/users/{id}", "/api/v1/users/{id}", "enforce", "api_key", 2),
        ("/uploads/*", "/uploads/*", "enforce", "api_key", 2),
        ("/api/v1/*", "/api/v1/*", "enforce", "api_key", 1),
    ]
    several = usage.rules[-1]
    assert [limit.text for limit in several.limits] == ["3/minute", "50/day"]
    assert several.decision.limit == 3


async def test_usage_creates_nothing(clock: Clock) -> None:
    counters = MemoryCounters(clock=clock)
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), counters)
    await gate.usage(FREE, IP)
    assert len(counters) == 0


async def test_usage_asks_the_store_once(clock: Clock) -> None:
    calls: list[Sequence[Charge]] = []

    class Counted(MemoryCounters):
        immediate = False

        async def charge(self, charges: Sequence[Charge]) -> list[Decision]:
            calls.append(charges)
            return await super().charge(charges)

    rules = "".join(
        f'[[tiers.rules]]\nendpoint = "/r{number}"\nlimits = ["1/s"]\npriority = {number}\n' for number in range(1003)
    )
    text = f'[[tiers]]\nname = "t"\n{rules}\n[[tiers]]\nname = "bare"\n[[api_keys]]\nkey = "{FREE}"\ntier = "t"\n'
    text += f'[[api_keys]]\nkey = "{OWN}"\ntier = "bare"\n'
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), Counted(clock=clock))
    usage = await gate.usage(FREE)
    assert (len(usage.rules), usage.truncated) == (MAX_USAGE_RULES, True)
    assert (usage.rules[0].rule, usage.rules[-1].rule) == ("/r1002", "/r3"), "the highest priority first"
    assert [len(charges) for charges in calls] == [MAX_USAGE_RULES]
    assert all(charge.cost == 0 for charge in calls[0])
    assert await gate.usage(OWN) == Usage("bare", ())
    assert len(calls) == 1, "where there is nothing to ask, the store is not asked"


async def test_usage_without_ip_names_what_it_leaves_out(gate: Gate) -> None:
    usage = await gate.usage(FREE)
    assert usage.not_counted == ("POST /login",)
    assert "POST /login" not in _left(usage)
    assert len(usage.rules) == 7
    assert await gate.usage() == Usage("open", (), ("/api/v1/*",))
    text = POLICY.replace('tier = "open"', 'tier = "free"')
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), MemoryCounters())
    usage = await gate.usage("")
    assert list(_left(usage)) == ["/everyone"], "all else counts callers without a key by ip"
    assert usage.not_counted[0] is None, "the tier's own limits"
    assert len(usage.not_counted) == 7


async def test_usage_counts_as_checks_do(gate: Gate) -> None:
    await gate.check(Check.of("/api/v1/a", api_key=OWN, ip=IP))
    assert _left(await gate.usage(OWN, IP))["/api/v1/*"] == 6, "the key's own limits"
    assert _left(await gate.usage(FREE, IP))["/api/v1/*"] == 3
    await gate.check(Check.of("/login", "POST", FREE, "2001:db8::1"))
    assert _left(await gate.usage(OWN, "2001:DB8:0:0:ffff::2"))["POST /login"] == 1
    await gate.check(Check.of("/login", "POST", FREE, IP))
    assert _left(await gate.usage(OWN, f"::ffff:{IP}"))["POST /login"] == 1
    await gate.check(Check.of("/api/v1/a", ip=IP))
    anonymous = await gate.usage(ip=IP)
    assert (anonymous.tier, _left(anonymous)) == ("open", {"/api/v1/*": 0})
    assert anonymous.rules[0].subject == "ip"


async def test_usage_rejects_as_checks_do(gate: Gate) -> None:
    refused: dict[Any, str] = {
        "nobody-knows-this-key": "INVALID_API_KEY",
        "short": "INVALID_API_KEY",
        REVOKED: "API_KEY_REVOKED",
        EXPIRED: "API_KEY_EXPIRED",
        7: "BAD_REQUEST",
    }
    for key, code in refused.items():
        with pytest.raises(TidegateError) as caught:
            await gate.usage(key, IP)
        assert caught.value.code == code
    with pytest.raises(BadRequest, match="not an IPv4 or IPv6 address"):
        await gate.usage(FREE, "1.2.3")
    closed = Gate(CachedCatalog(PolicyCatalog(parse_policy('[[tiers]]\nname = "t"'))), MemoryCounters())
    with pytest.raises(MissingApiKey):
        await closed.usage(ip=IP)


async def _consume(gate: Gate) -> None:
    """One unit of everything: for two keys, two addresses, and an address without a key."""
    for key in (FREE, OWN):
        for path, method in (("/api/v1/a", "GET"), ("/login", "POST"), ("/everyone", "GET"), ("/watched", "GET")):
            await gate.check(Check.of(path, method, key, IP))
    await gate.check(Check.of("/login", "POST", FREE, OTHER_IP))
    for ip in (IP, OTHER_IP):
        await gate.check(Check.of("/api/v1/a", ip=ip))


async def test_reset_of_a_key(gate: Gate) -> None:
    fresh = _left(await gate.usage(FREE, IP))
    await _consume(gate)
    other = await gate.usage(OWN, IP)
    shared = _left(other)
    assert await gate.reset(FREE) == 6, "the tier's own limits and five rules by key"
    assert _left(await gate.usage(FREE, IP)) == {
        **fresh,
        "POST /login": shared["POST /login"],
        "/everyone": shared["/everyone"],
    }, "what other subjects share stays"
    assert await gate.usage(OWN, IP) == other
    assert await gate.reset(FREE) == 6, "whether anything was held or not"
    assert await gate.reset(OWN) == 6
    assert _left(await gate.usage(OWN, IP))["/api/v1/*"] == 7, "the key's own limits"


async def test_reset_of_an_ip(gate: Gate) -> None:
    await _consume(gate)
    before = _left(await gate.usage(FREE, IP))
    away = await gate.usage(FREE, OTHER_IP), await gate.usage(ip=OTHER_IP)
    assert await gate.reset(ip=IP) == 2, "by ip in the tiers free and open"
    assert _left(await gate.usage(FREE, IP)) == {**before, "POST /login": 2}
    assert _left(await gate.usage(ip=IP)) == {"/api/v1/*": 1}
    assert (await gate.usage(FREE, OTHER_IP), await gate.usage(ip=OTHER_IP)) == away
    await gate.check(Check.of("/login", "POST", FREE, "2001:db8::1"))
    await gate.reset(ip="2001:db8::ffff")
    assert _left(await gate.usage(FREE, "2001:db8::2"))["POST /login"] == 2, "one /64 is one client"


async def test_reset_of_an_ip_reaches_callers_without_a_key() -> None:
    text = POLICY.replace('tier = "open"', 'tier = "free"')
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), MemoryCounters())
    fresh = _left(await gate.usage(ip=IP))
    for path, method in (("/api/v1/a", "GET"), ("/login", "POST"), ("/watched", "GET"), ("/elsewhere", "GET")):
        await gate.check(Check.of(path, method, ip=IP))
        await gate.check(Check.of(path, method, FREE, OTHER_IP))
    keyed = _left(await gate.usage(FREE, OTHER_IP))
    assert await gate.reset(ip=IP) == 8, "the tier's own limits, five rules by key, and by ip in the tiers free and open"
    assert _left(await gate.usage(ip=IP)) == fresh
    assert _left(await gate.usage(FREE, OTHER_IP)) == keyed


async def test_reset_of_a_tier(gate: Gate) -> None:
    await _consume(gate)
    before = _left(await gate.usage(FREE, IP))
    assert before["/everyone"] == 0
    assert await gate.reset(tier="free") == 1
    assert _left(await gate.usage(FREE, IP)) == {**before, "/everyone": 2}
    assert await gate.reset(tier="tight") == 0, "nothing there counts by tier"


async def test_keys_that_are_not_let_in_can_be_reset(clock: Clock) -> None:
    catalog = PolicyCatalog(parse_policy(POLICY))
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters(clock=clock))
    for _ in range(3):
        await gate.check(Check.of("/api/v1/a", api_key=FREE))
    for refused in ('status = "revoked"', "expires_at = 2020-01-01T00:00:00Z"):
        catalog.replace(parse_policy(POLICY.replace(f'key = "{FREE}"', f'key = "{FREE}"\n{refused}')))
        cached.invalidate()
        assert await gate.reset(FREE) == 6
        catalog.replace(parse_policy(POLICY))
        cached.invalidate()
        decision = await gate.check(Check.of("/api/v1/a", api_key=FREE, cost=3))
        assert (decision.allowed, decision.remaining) == (True, 0)


async def test_reset_goes_to_the_store_in_pieces(clock: Clock) -> None:
    pieces: list[int] = []

    class Counted(MemoryCounters):
        async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
            pieces.append(len(counters))
            await super().reset(counters)

    rules = "".join(f'[[tiers.rules]]\nendpoint = "/r{number}"\nlimits = ["1/s"]\nsubject = "ip"\n' for number in range(1200))
    text = f'[[tiers]]\nname = "a"\n{rules}\n[[tiers]]\nname = "b"\n{rules}'
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), Counted(clock=clock))
    assert await gate.reset(ip=IP) == 2400
    assert pieces == [1000, 1000, 400]


async def test_resets_that_make_no_sense(gate: Gate) -> None:
    arguments: tuple[dict[str, Any], ...] = ({}, {"api_key": FREE, "ip": IP}, {"ip": IP, "tier": "free"})
    for given in arguments:
        with pytest.raises(BadRequest, match="exactly one"):
            await gate.reset(**given)
    with pytest.raises(BadRequest, match="not an IPv4 or IPv6 address"):
        await gate.reset(ip="localhost")
    for tier in ("none", ""):
        with pytest.raises(BadRequest, match="there is no tier"):
            await gate.reset(tier=tier)
    for key in ("", "short", "nobody-knows-this-key"):
        with pytest.raises(InvalidApiKey):
            await gate.reset(key)
    wrong: tuple[dict[str, Any], ...] = ({"api_key": 1}, {"tier": 1}, {"ip": 1})
    for given in wrong:
        with pytest.raises(BadRequest):
            await gate.reset(**given)


async def test_the_observation_names_the_limits_that_denied(clock: Clock, seen: list[Observation]) -> None:
    """A check that its rule lets pass and the tier's own limits do not is the caller's, not the address's."""
    policy = """
[[tiers]]
name = "free"
limits = ["3/hour"]
  [[tiers.rules]]
  endpoint = "/login"
  subject = "ip"
  limits = ["2/hour"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(policy))), MemoryCounters(clock=clock), seen.append)
    for path in ("/login", "/login", "/login", "/x", "/x"):
        await gate.check(Check.of(path, api_key="demo-free-key-0001", ip="203.0.113.7"))
    told = [(each.subject[:2] if each.subject else None, each.denied_by and each.denied_by.rule) for each in seen]
    assert [each.decision.allowed for each in seen if each.decision] == [True, True, False, True, False]
    assert [each.denied_by is None for each in seen] == [True, True, False, True, False]
    assert told[2] == ("i:", "/login")
    assert told[4] == ("k:", None)
    assert seen[4].denied_by is not None
    assert seen[4].denied_by.tier == "free"
