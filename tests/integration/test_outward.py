"""What clients are told while a store is away: no address of ours at any door; the log has it."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.integration.ratelimit_client import request as rls_request
from tests.rsgi import call
from tests.servers.ports import free_port
from tests.unit.test_gate import CountingCatalog
from tidegate.catalog.cached import CachedCatalog
from tidegate.counters import CounterStore
from tidegate.counters.factory import open_counters
from tidegate.counters.memory import MemoryCounters
from tidegate.doors import outward
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.grpc.messages import RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.grpc.status import CallRefused
from tidegate.doors.http import DataPlane
from tidegate.doors.responses import encode
from tidegate.errors import CatalogUnavailable
from tidegate.gate.gate import Gate
from tidegate.policy.model import ApiKey
from tidegate.settings import CounterSettings, EnvoySettings
from tidegate.telemetry.health import Health

POLICY = """\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["3/day"]
  on_failure = "deny"
[[api_keys]]
key = "policy-file-key-0001"
tier = "free"
"""
KEY = b"policy-file-key-0001"
REASON = 'connection to server at "10.0.0.5", port 5432 failed: FATAL: no such user'


class _AwayCatalog(CountingCatalog):
    async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
        raise CatalogUnavailable(f"the catalog's database does not answer: {REASON}")


@pytest.fixture(autouse=True)
def _logs_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outward, "_logged_at", {})


@pytest.fixture
async def away() -> AsyncIterator[CounterStore]:
    """Counters on a Redis that is not there."""
    store = open_counters(CounterSettings(url=f"redis://127.0.0.1:{free_port()}", timeout_ms=1000))
    yield store
    await store.close()


async def told_by_all_doors(gate: Gate, code: str) -> list[str]:
    """What each door answers to the same request."""
    data_plane = DataPlane(gate, {})
    key, path = ("X-API-Key", KEY), ("X-Original-URI", b"/a")
    check = {"path": "/a", "api_key": KEY.decode()}
    answers = [
        await call(data_plane, "/v1/authorize", [key, path]),
        await call(data_plane, "/v1/check", method="POST", body=json.dumps(check).encode()),
        await call(data_plane, "/v1/check/batch", method="POST", body=json.dumps({"checks": [check]}).encode()),
    ]
    assert [answer.status for answer in answers] == [503, 503, 200]
    told = [answer.body.decode() + str(answer.headers) for answer in answers]
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(RateLimitMiddleware(_app, gate=gate)), base_url="http://api"
    ) as http:
        answer = await http.get("/a", headers={"X-API-Key": KEY.decode()})
        assert answer.status_code == 503
        told.append(answer.text + str(answer.headers))
    try:
        sent = rls_request([("path", "/a"), ("api_key", KEY)]).SerializeToString()
        denied = RateLimitResponse.FromString(await RateLimitService(gate, EnvoySettings()).answer(sent))
        told.append(denied.raw_body.decode() + str(denied.response_headers_to_add))
    except CallRefused as refused:
        told.append(f"{code}: {refused.message}")
    assert all(code in each for each in told)
    return told


async def _app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("nothing passes")


async def test_a_counter_store_that_is_unavailable(away: CounterStore, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(CachedCatalog(CountingCatalog(POLICY)), away)
    with caplog.at_level(logging.WARNING, outward.__name__):
        told = await told_by_all_doors(gate, "STORE_UNAVAILABLE")
    assert not [each for each in told if "127.0.0.1" in each or "Redis" in each]
    exact = [record.getMessage() for record in caplog.records if record.name == outward.__name__]
    assert exact
    assert all("Redis at 127.0.0.1:" in each for each in exact)


async def test_a_catalog_that_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(CachedCatalog(_AwayCatalog(POLICY)), MemoryCounters())
    with caplog.at_level(logging.WARNING, outward.__name__):
        told = await told_by_all_doors(gate, "CATALOG_UNAVAILABLE")
    assert not [each for each in told if "10.0.0.5" in each or "server at" in each]
    assert REASON in caplog.text


async def test_health_names_no_host(away: CounterStore, caplog: pytest.LogCaptureFixture) -> None:
    async def database() -> None:
        raise CatalogUnavailable(REASON)

    async def other() -> None:
        raise OSError("cannot reach 10.0.0.7")

    health = Health()
    for name, ping in (("redis", away.ping), ("database", database), ("other", other)):
        health.add(name, ping)
    with caplog.at_level(logging.WARNING):
        report = await health.report()
    reasons = {name: each.reason for name, each in report.components.items()}
    assert reasons == {
        "redis": "STORE_UNAVAILABLE (disconnected)",
        "database": "CATALOG_UNAVAILABLE",
        "other": "OSError",
        "rate_limiter": None,
    }
    assert b"10.0.0" not in encode(report)
    assert "database is unhealthy: CatalogUnavailable: connection to server" in caplog.text


def test_the_log_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, outward.__name__):
        for _ in range(1000):
            outward.outward(CatalogUnavailable(REASON))
    # Once a second; a thousand take a few milliseconds, but a busy machine may need longer.
    assert 1 <= len(caplog.records) < 500
