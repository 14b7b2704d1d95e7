"""Quotas and overage over HTTP: what a gateway, a back end and a customer see of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from tests.cases.quotas import us
from tests.conftest import Clock
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.client import AsyncClient
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy
from tidegate.telemetry.metrics import Metrics

KEY = "a-key-of-a-customer-1"
POLICY = f"""
[[tiers]]
name = "pro"
quotas = ["4/month"]
overage = {{ up_to = "50%" }}
limits = ["100/day"]

  [[tiers.rules]]
  endpoint = "/soft"
  limits = ["1/minute"]
  mode = "soft"

[[api_keys]]
key = "{KEY}"
tier = "pro"
"""


async def test_what_is_above_a_quota_is_said_at_every_door(clock: Clock, listen: Callable[..., Any]) -> None:
    clock.now_us = us("2026-11-30T12:00Z")
    metrics = Metrics("0")
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock), metrics.observe)
    url = await listen(DataPlane(gate, {}))
    key = {"X-API-Key": KEY}
    async with httpx.AsyncClient(base_url=url, headers=key) as client:

        async def authorize(uri: str) -> httpx.Response:
            return await client.get("/v1/authorize", headers={"X-Original-URI": uri})

        soft = [await authorize("/soft") for _ in range(2)]
        assert [each.headers.get("x-tidegate-overage") for each in soft] == [None, "1"]
        assert '"quota 4/month";q=4;w=2678400' in soft[0].headers["ratelimit-policy"]
        first = await client.post("/v1/check", json={"path": "/any", "cost": 2})
        assert (first.json()["overage"], first.json()["remaining"], first.json()["limit"]) == (0, 0, 4)
        # A path that the plain reader leaves to the other one.
        assert [(await authorize(uri)).headers.get("x-tidegate-overage") for uri in ("/any", "/%C3%A9")] == ["1", "1"]
        denied = await authorize("/any")
        assert (denied.status_code, denied.headers.get("x-tidegate-overage")) == (429, None)
        assert denied.headers["retry-after"] == str(12 * 3600)
        (own, rule) = (await client.get("/v1/usage")).json()["rules"]
        assert own["windows"][1] == {
            "limit": 4,
            "window": 2_678_400,
            "used": 6,
            "remaining": 0,
            "resets_at": "2026-12-01T00:00:00Z",
            "period": "month",
        }
        assert (own["remaining"], own["rule"], rule["mode"], rule["windows"][0]["period"]) == (0, None, "soft", None)
        peek = await client.post("/v1/check", json={"path": "/any", "cost": 0})
        assert (peek.json()["allowed"], peek.json()["overage"]) == (True, 2), "all that is above it"
        clock.now_us = us("2026-12-01T00:00Z")
        assert (await client.post("/v1/check", json={"path": "/any"})).json()["remaining"] == 3
    async with AsyncClient(url) as library:
        answer = await library.check("/any", api_key=KEY, cost=5)
        assert (answer.allowed, answer.overage) == (True, 2)
        windows = (await library.usage(KEY)).rules[0].windows
        assert [(each.used, each.period) for each in windows] == [(12, None), (6, "month")]
    exposed = (await metrics.exposition()).decode()
    assert 'rate_limiter_overage_units_total{rule="/soft soft",tier="pro"} 1.0' in exposed
    assert 'rate_limiter_overage_units_total{rule="",tier="pro"} 4.0' in exposed, "the peek is not counted"
