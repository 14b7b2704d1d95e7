"""`GET /v1/usage` over a real listener, and resets over a catalog in a database."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cases.doors import EXPIRED, FREE, POLICY, REVOKED
from tests.conftest import Clock
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.counters import Charge
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Check
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.http import DataPlane
from tidegate.errors import StoreUnavailable
from tidegate.gate.gate import Gate
from tidegate.gate.usage import MAX_USAGE_RULES, peek_windows
from tidegate.observation import Observation
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy

IP = "203.0.113.7"
KEYED = {"X-API-Key": FREE, "X-Real-IP": IP}


def _left(response: httpx.Response) -> dict[str | None, int]:
    assert response.status_code == 200, response.text
    return {each["rule"]: each["remaining"] for each in response.json()["rules"]}


async def test_usage_over_http(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        for path, method in (("/api/v1/a", "GET"), ("/login", "POST"), ("/watched", "GET")):
            sent = {"path": path, "method": method, "api_key": FREE, "ip": IP}
            assert (await client.post("/v1/check", json=sent)).status_code == 200
        response = await client.get("/v1/usage", headers=KEYED)
        assert (await client.get("/v1/usage", headers=KEYED)).json() == response.json(), "asking consumes nothing"
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"
        assert "ratelimit" not in response.headers
        body = response.json()
        assert (body["tier"], body["not_counted"], body["truncated"]) == ("free", [], False)
        by_rule = {each["rule"]: each for each in body["rules"]}
        assert body["rules"][0] == by_rule[None]
        assert (by_rule[None]["remaining"], by_rule[None]["window"], by_rule[None]["endpoint"]) == (17, 86400, None)
        assert by_rule["POST /login"] == {
            "rule": "POST /login",
            "endpoint": "/login",
            "mode": "enforce",
            "subject": "ip",
            "limit": 2,
            "remaining": 1,
            "reset_after": 40.000001,
            "window": 60,
            "degraded": False,
            "windows": [
                {"limit": 2, "window": 60, "used": 1, "remaining": 1, "resets_at": "2023-11-14T22:14:00.000001Z", "period": None},
            ],
        }
        assert by_rule["/everyone"]["windows"][0]["resets_at"] is None, "nothing is consumed"
        assert (by_rule["/watched shadow"]["mode"], by_rule["/watched shadow"]["remaining"]) == ("shadow", 0)
        assert (by_rule["/everyone"]["remaining"], by_rule["/everyone"]["reset_after"]) == (2, 0)
        await gate.reset(FREE)
        assert _left(await client.get("/v1/usage", headers=KEYED)) == {
            **{rule: each["limit"] for rule, each in by_rule.items()},
            "POST /login": 1,
        }
        head = await client.head("/v1/usage", headers=KEYED)
        assert (head.status_code, head.content) == (200, b"")


async def test_the_address_is_whom_authorize_would_count(gate: Gate, listen: Callable[..., Any]) -> None:
    await gate.check(Check.of("/login", "POST", FREE, IP))
    await gate.check(Check.of("/api/v1/a", ip=IP))
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        for headers, left in (
            ({"X-Real-IP": IP}, 1),
            ({"X-Forwarded-For": f"1.1.1.1, {IP}, 127.0.0.1"}, 1),
            ({"X-Forwarded-For": "198.51.100.1"}, 2),
            ({}, 2),
        ):
            assert _left(await client.get("/v1/usage", headers={"X-API-Key": FREE, **headers}))["POST /login"] == left
        anonymous = await client.get("/v1/usage", headers={"X-Real-IP": IP})
        assert (anonymous.json()["tier"], _left(anonymous)) == ("open", {"/api/v1/*": 0})
        assert _left(await client.get("/v1/usage", headers={"X-Real-IP": "198.51.100.1"})) == {"/api/v1/*": 1}
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}, trusted=TrustedProxies(["10.0.0.0/8"])))) as client:
        assert _left(await client.get("/v1/usage", headers=KEYED))["POST /login"] == 2, "not believed: the peer is asked for"


async def test_usage_errors_over_http(gate: Gate, listen: Callable[..., Any]) -> None:
    told: list[Observation] = []
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}, told.append))) as client:
        refused: list[tuple[Any, int, str]] = [
            ({"X-API-Key": "nobody-knows-this-key"}, 401, "INVALID_API_KEY"),
            ({"X-API-Key": REVOKED}, 403, "API_KEY_REVOKED"),
            ({"X-API-Key": EXPIRED}, 403, "API_KEY_EXPIRED"),
            ([("X-API-Key", FREE), ("X-API-Key", FREE)], 400, "BAD_REQUEST"),
            ([("X-API-Key", FREE), ("X-Real-IP", "192.0.2.1"), ("X-Real-IP", "192.0.2.2")], 400, "BAD_REQUEST"),
            ({"X-API-Key": FREE, "X-Filler": "f" * 9000}, 431, "HEADERS_TOO_LARGE"),
        ]
        for headers, status, code in refused:
            response = await client.get("/v1/usage", headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert response.headers["x-tidegate-error"] == code
        assert [each.error for each in told] == [code for _, _, code in refused], "each is counted once"
        response = await client.post("/v1/usage")
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    closed = Gate(CachedCatalog(PolicyCatalog(parse_policy('[[tiers]]\nname = "t"'))), MemoryCounters())
    async with httpx.AsyncClient(base_url=await listen(DataPlane(closed, {}))) as client:
        response = await client.get("/v1/usage")
        assert (response.status_code, response.json()["error"]["code"]) == (401, "MISSING_API_KEY")


async def test_a_store_that_fails_is_reported(listen: Callable[..., Any]) -> None:
    class Failing(MemoryCounters):
        immediate = False

        async def charge(self, charges: Sequence[Charge]) -> list[Any]:
            return [StoreUnavailable("away") for _ in charges]

    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), Failing())
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        response = await client.get("/v1/usage", headers=KEYED)
        assert response.status_code == 200
        rules = response.json()["rules"]
        assert rules
        assert all(rule["degraded"] and rule["remaining"] is None for rule in rules)


TWO = f"""
[[tiers]]
name = "t"
limits = ["1000/day", "20/hour"]
  [[tiers.rules]]
  endpoint = "/w"
  limits = ["5/minute", "10/day", "100/month"]
  [[tiers.rules]]
  endpoint = "/b"
  algorithm = "token_bucket"
  limits = ["60/minute burst 9", "100/day"]
[[api_keys]]
key = "{FREE}"
tier = "t"
"""


async def test_every_window_of_a_rule_is_reported(clock: Clock, listen: Callable[..., Any]) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(TWO))), MemoryCounters(clock=clock))
    await gate.check(Check.of("/w", api_key=FREE, cost=3))
    clock.advance(120)
    await gate.check(Check.of("/w", api_key=FREE, cost=2))
    await gate.check(Check.of("/b", api_key=FREE, cost=4))
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        rules = (await client.get("/v1/usage", headers=KEYED)).json()["rules"]
    told = {each["rule"]: [tuple(window.values())[:-1] for window in each["windows"]] for each in rules}
    # A sliding window is replenished when what is left of the window before is less than one: of 9 an hour after 8/9 of the next.
    assert told == {
        None: [(20, 3600, 9, 11, "2023-11-14T23:53:20.000001Z"), (1000, 86_400, 9, 991, "2023-11-15T21:20:00.000001Z")],
        "/w": [
            (5, 60, 2, 3, "2023-11-14T22:16:30.000001Z"),
            (10, 86_400, 5, 5, "2023-11-15T19:12:00.000001Z"),
            (100, 2_678_400, 5, 95, "2023-12-25T19:12:00.000001Z"),
        ],
        "/b": [(9, 60, 4, 5, "2023-11-14T22:15:24Z"), (100, 86_400, 4, 96, "2023-11-14T23:12:56Z")],
    }
    assert {each["rule"]: each["window"] for each in rules} == {None: 3600, "/w": 60, "/b": 60}, "and which has the least left"


async def test_asking_for_windows_consumes_and_moves_nothing(clock: Clock) -> None:
    """Also where the rule has had other windows before: what a subject consumed stays where checks look for it."""
    catalog = PolicyCatalog(parse_policy(TWO))
    cached = CachedCatalog(catalog)
    gate = Gate(cached, MemoryCounters(clock=clock))
    await gate.check(Check.of("/w", api_key=FREE, cost=3))
    catalog.replace(parse_policy(TWO.replace('"5/minute", ', "")))
    cached.invalidate()
    for _ in range(2):
        assert [window.remaining for window in (await gate.usage(FREE)).rules[1].windows] == [7, 97]
    assert not (await gate.check(Check.of("/w", api_key=FREE, cost=8))).allowed
    assert (await gate.usage(FREE)).rules[0].windows[0].remaining == 17


@pytest.mark.parametrize("algorithm", list(Algorithm))
@pytest.mark.parametrize("kind", ["redis_server", "redis_cluster"])
async def test_windows_on_redis_are_those_of_memory(algorithm: Algorithm, kind: str, request: pytest.FixtureRequest) -> None:
    stores = (MemoryCounters(), GuardedCounters(RedisCounters(request.getfixturevalue(kind).url, 2.0)))
    limits = LimitSet(
        f"windows:{secrets.token_hex(8)}", algorithm, [Limit.parse(text) for text in ("7/366d", "9/200d", "30/month")]
    )
    one = LimitSet(f"windows:{secrets.token_hex(8)}", algorithm, [Limit.parse("3/366d")])
    told = []
    for store in stores:
        for cost in (1, 1, 8):
            await store.charge([Charge(((limits, "a"),), cost)])
        seen = await peek_windows(store, [((limits, "a"),), ((limits, "b"),), ((one, "a"),)])
        again = await peek_windows(store, [((limits, "a"),), ((limits, "b"),), ((one, "a"),)])
        for _, windows in (*seen, *again):
            assert [each.binding for each in windows] in ([*limits.limits], [*one.limits])
        told.append([[each.remaining for each in windows] for _, windows in seen])
        assert [[each.remaining for each in windows] for _, windows in again] == told[-1], "nothing is consumed"
        for decision, windows in seen:
            assert decision.remaining == min(each.remaining or 0 for each in windows)
        await store.close()
    assert told[0] == told[1]


async def test_a_redis_that_is_unavailable_reports_no_windows(new_redis: Callable[..., Any]) -> None:
    redis = new_redis()
    store = GuardedCounters(RedisCounters(redis.url, 0.2))
    await store.start()
    limits = LimitSet("windows", Algorithm.SLIDING_WINDOW, [Limit.parse("5/day"), Limit.parse("7/month")])
    await peek_windows(store, [((limits, "a"),)])
    redis.kill()
    ((decision, windows),) = await peek_windows(store, [((limits, "a"),)])
    assert (decision.degraded, windows) == (True, ())
    assert await store.windows([(limits, "a")]) == [None]
    await store.close()


async def test_an_answer_is_bounded(listen: Callable[..., Any]) -> None:
    rules = "".join(f'[[tiers.rules]]\nendpoint = "/r{number}"\nlimits = ["1/month"]\n' for number in range(1001))
    text = f'[[tiers]]\nname = "t"\nlimits = ["5/s"]\n{rules}\n[[api_keys]]\nkey = "{FREE}"\ntier = "t"\n'
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(text))), MemoryCounters())
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        body = (await client.get("/v1/usage", headers=KEYED)).json()
    assert body["truncated"] is True
    assert len(body["rules"]) == MAX_USAGE_RULES + 1, "the tier's own limits beside the rules"
    assert body["rules"][1]["window"] == 31 * 86400


async def test_resets_over_a_database(tmp_path: Path) -> None:
    catalog = await SqlCatalog.open(f"sqlite:///{tmp_path}/tidegate.db")
    try:
        assert await catalog.tier_names() == []
        await catalog.apply_policy(parse_policy(POLICY), "1")
        assert await catalog.tier_names() == ["free", "open", "reader", "tight"]
        gate = Gate(CachedCatalog(catalog), MemoryCounters())
        await gate.check(Check.of("/login", "POST", FREE, IP))
        await gate.check(Check.of("/api/v1/a", ip=IP))
        await gate.check(Check.of("/everyone", api_key=FREE))
        assert [await gate.reset(ip=IP), await gate.reset(tier="free"), await gate.reset(FREE)] == [2, 1, 6]
        for usage in (await gate.usage(FREE, IP), await gate.usage(ip=IP)):
            assert all(each.decision.remaining == each.decision.limit for each in usage.rules)
    finally:
        await catalog.close()
