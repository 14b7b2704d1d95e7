"""Whom a lowered limit leaves nothing is told with the change."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert

from tests.integration.admin_api import Admin
from tidegate.catalog.sql.tables import rate_limit_violations
from tidegate.decision import Check
from tidegate.timestamps import now_us

ANY = {"If-Match": "*"}


async def _lower(admin: Admin, rule: dict[str, Any], limit: str) -> list[str]:
    answer = await admin.http.patch(f"/rate-limit-rules/{rule['id']}", json={"limits": [limit]}, headers=ANY)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["warnings"])


async def test_a_rule_by_key_checks_keys_of_the_tier(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule("/api/*", limits=["50/hour"])
    keys = [await admin.key() for _ in range(5)]
    for number, key in enumerate(keys):
        await admin.gate.check(Check.of("/api/a", api_key=key["api_key"], cost=10 * number))
    assert await _lower(admin, rule, "45/hour") == []
    (said,) = await _lower(admin, rule, "20/hour")
    assert "rule '/api/*': 3 of 5 checked callers, e.g. the API key " in said
    held_s = int(said.rsplit(" ", 2)[1])
    # 40 units fade out of the next window 90 s before its end.
    assert 3600 - 90 <= held_s <= 2 * 3600 - 90, "to the end of the next window, which is one to two lengths away"


async def test_keys_with_limits_of_their_own_are_not_counted(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule("/api/*", limits=["50/hour"])
    key = await admin.key()
    await admin.gate.check(Check.of("/api/a", api_key=key["api_key"], cost=40))
    overrides = {"overrides": [{"rule": rule["name"], "limits": ["60/hour"]}]}
    assert (await admin.http.put(f"/api-keys/{key['id']}/overrides", json=overrides, headers=ANY)).json()["warnings"] == []
    assert await _lower(admin, rule, "10/hour") == []


async def test_a_tiers_own_limits(admin: Admin) -> None:
    await admin.tier(limits=("100/hour",))
    key = await admin.key()
    await admin.gate.check(Check.of("/x", api_key=key["api_key"], cost=30))
    put = await admin.http.put("/tiers/free", json={"limits": ["30/hour"]}, headers=ANY)
    assert "the limits over all endpoints: 1 of 1 checked callers" in put.json()["warnings"][0]
    patched = await admin.http.patch("/tiers/free", json={"limits": ["31/hour"]}, headers=ANY)
    assert patched.json()["warnings"] == []
    assert (await admin.http.put("/tiers/free", json={"limits": []}, headers=ANY)).json()["warnings"] == []


async def test_a_rule_by_ip_checks_blocked_addresses(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule("/login", subject="ip", limits=["50/hour"])
    key = await admin.key()
    for last in (7, 8):
        await admin.gate.check(Check.of("/login", api_key=key["api_key"], ip=f"203.0.113.{last}", cost=40))
    assert await _lower(admin, rule, "40/hour") == [], "nobody knows of an address that was never blocked"
    minute_us = now_us() // 60_000_000 * 60_000_000
    row = {"minute_us": minute_us, "tier": "free", "rule": rule["name"], "subject": "i:203.0.113.7", "blocked": 3}
    async with admin.catalog.database.transaction() as connection:
        await connection.execute(insert(rate_limit_violations), [row])
    (said,) = await _lower(admin, rule, "39/hour")
    assert "1 of 1 checked callers, e.g. 203.0.113.7, have used up" in said


async def test_a_rule_by_attribute_checks_blocked_callers(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule("/api/*", subject=["org", "user"], limits=["50/hour"])
    caller = {"org": "acme", "user": "a&b"}
    await admin.gate.check(Check.of("/api/a", ip="203.0.113.7", attributes=caller, tier="free", cost=40))
    minute_us = now_us() // 60_000_000 * 60_000_000
    row = {"minute_us": minute_us, "tier": "free", "rule": rule["name"], "subject": "a:org=acme&user=a%26b", "blocked": 3}
    async with admin.catalog.database.transaction() as connection:
        await connection.execute(insert(rate_limit_violations), [row])
    assert await _lower(admin, rule, "41/hour") == []
    (said,) = await _lower(admin, rule, "39/hour")
    assert "1 of 1 checked callers, e.g. org=acme&user=a%26b, have used up" in said
