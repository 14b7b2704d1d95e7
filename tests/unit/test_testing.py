"""`tidegate.testing`, and limiters and gates from a policy file."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest

from tests.conftest import Clock
from tidegate import (
    BadRequest,
    Check,
    Gate,
    Limiter,
    MemoryCounters,
    PolicyError,
    RateLimitExceeded,
    SettingsError,
    SyncLimiter,
    limit,
)
from tidegate.doors.responses import limit_headers
from tidegate.testing import MovableClock, allow_all, movable_clock, rate_limits, reset_all  # noqa: F401 - a fixture

POLICY = """
[[namespaces]]
name = "emails"
limits = ["2/minute"]
algorithm = "fixed_window"

  [[namespaces.overrides]]
  subject = "vip-*"
  limits = ["3/minute"]

[[namespaces]]
name = "open"

[[tiers]]
name = "free"

  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["1/minute"]

[[api_keys]]
key = "a-key-for-tests-0001"
tier = "free"
"""


@limit("2/minute", key="email", algorithm="fixed_window")
def send_mail(email: str) -> str:
    return email


@pytest.mark.parametrize("_", range(2))
def test_the_fixture_begins_with_nothing_consumed(rate_limits: MovableClock, _: int) -> None:  # noqa: F811
    send_mail("a")
    send_mail("a")
    with pytest.raises(RateLimitExceeded):
        send_mail("a")
    rate_limits.advance(60)
    send_mail("a")
    with SyncLimiter("1/minute") as limiter:
        assert [limiter.check("u").allowed for _ in range(2)] == [True, False]
        rate_limits.advance(120)
        assert limiter.check("u").allowed


def test_the_clock_is_put_back() -> None:
    limiter = SyncLimiter("1/day")
    with movable_clock(1_000_000_000.0) as clock:
        assert limiter.check("u").at_us == 1_000_000_000_000_000
        clock.advance(0.5)
        assert clock.now_s == 1_000_000_000.5
        with pytest.raises(ValueError, match=r"cannot go back by 1 s"):
            clock.advance(-1)
    after = limiter.check("u")
    assert after.allowed, "nothing is consumed after a test"
    assert after.at_us > 1_700_000_000_000_000


async def test_allow_all_and_reset_all() -> None:
    limiter = Limiter("1/day")
    with allow_all():
        assert [(await limiter.check("u")).remaining for _ in range(3)] == [1, 1, 1]
        assert [send_mail("x") for _ in range(5)] == ["x"] * 5
        assert [each.allowed for each in await limiter.check_many([("u", 1)] * 3) if not isinstance(each, Exception)] == [
            True
        ] * 3
    assert [(await limiter.check("u")).allowed for _ in range(2)] == [True, False]
    reset_all()
    assert (await limiter.check("u")).allowed


async def test_the_headers_of_a_decision() -> None:
    limiter = Limiter("1/minute", counters=MemoryCounters(clock=Clock()))
    passed, denied = [await limiter.check("u") for _ in range(2)]
    assert dict(passed.headers) == {
        "ratelimit-policy": '"1/minute";q=1;w=60',
        "ratelimit": '"1/minute";r=0;t=41',
        "x-ratelimit-limit": "1",
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": "1700000041",
    }
    assert dict(denied.headers)["retry-after"] == str(-(-(denied.retry_after_us or 0) // 1_000_000))
    assert limit_headers(denied) == denied.headers


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    return path


async def test_a_limiter_from_a_policy(policy: Path) -> None:
    store = MemoryCounters(clock=Clock())
    async with Limiter.from_policy(policy, "emails", counters=store) as limiter, Gate.from_policy(policy, counters=store) as gate:
        assert [(await limiter.check("a")).allowed for _ in range(3)] == [True, True, False]
        assert [(await limiter.check("vip-a")).remaining for _ in range(2)] == [2, 1]
        namespaces = await gate.request_limits.namespaces()
        shared = await gate.request_limits.check(gate.request_limits.read(namespaces, "emails", "vip-a"))
        assert shared.remaining == 0, "counted together with POST /v1/limit"
        await limiter.reset("a")
        assert (await limiter.check("a")).remaining == 1
        with pytest.raises(BadRequest, match="subject '' must be"):
            await limiter.check("")
        api = Check.of("/api/x", "GET", "a-key-for-tests-0001")
        assert [(await gate.check(api)).allowed for _ in range(2)] == [True, False]
    with SyncLimiter.from_policy(policy, "emails") as blocking:
        assert [blocking.check("a").allowed for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("name", ["open", "mails"])
def test_a_namespace_that_has_no_limits(policy: Path, name: str) -> None:
    with pytest.raises(PolicyError, match=rf"no \[\[namespaces\]\] with limits named '{name}': it has emails"):
        Limiter.from_policy(policy, name)


def test_a_gate_with_a_url_that_is_not_understood(policy: Path) -> None:
    with pytest.raises(SettingsError, match="Tidegate counts in Redis or in memory"):
        Gate.from_policy(policy, counters="mongodb://x")


def test_the_shipped_example_under_a_test_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchanged, with the lifespan and without."""
    monkeypatch.delenv("TIDEGATE_COUNTERS__URL", raising=False)
    with warnings.catch_warnings():
        # Starlette 1.x prefers a successor of httpx.
        warnings.simplefilter("ignore")
        from fastapi.testclient import TestClient
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "fastapi_app.py"))
    key = {"X-API-Key": "demo-free-key-0001"}
    client = TestClient(example["app"])
    assert [client.get("/api/items", headers=key).status_code for _ in range(2)] == [200] * 2
    with client:
        assert client.get("/api/export", headers=key).status_code == 200, "costs 3 of 5"
        denied = client.get("/api/items", headers=key)
    assert (denied.status_code, denied.json()["error"]["code"]) == (429, "RATE_LIMIT_EXCEEDED")
    assert int(denied.headers["retry-after"]) > 0
    assert [client.post("/login").status_code for _ in range(4)] == [200] * 3 + [429], "by address"
    assert client.get("/api/items", headers={"X-API-Key": "unknown"}).status_code == 401
