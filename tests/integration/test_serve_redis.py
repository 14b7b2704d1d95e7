"""`tidegate serve` on Redis, as a user runs it: two instances, one set of counters, and a Redis that goes away and comes back."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.moments import wait_until
from tests.servers.redis_server import RedisServer

KEY = "demo-free-key-0001"
POLICY = f"""\
[[tiers]]
name = "free"
limits = ["1000/day"]
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["50/day"]
  [[tiers.rules]]
  endpoint = "/deny/*"
  limits = ["50/day"]
  on_failure = "deny"
[[api_keys]]
key = "{KEY}"
tier = "free"
"""


def check(server: Any, path: str = "/api/a", **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/check", json={"path": path, "api_key": KEY, **fields})


def test_two_instances_admit_the_limit_once(
    serve: Callable[..., Any], new_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    # Far above what a call takes: the machine may be busy, and this test is about counts.
    shared = {"TIDEGATE_COUNTERS__URL": new_redis().url, "TIDEGATE_COUNTERS__TIMEOUT_MS": "5000"}
    servers = [serve(**shared) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda number: check(servers[number % 2]).status_code, range(120)))
    assert sorted(statuses) == [200] * 50 + [429] * 70
    for server in servers:
        usage = httpx.get(f"{server.url}/v1/usage", headers={"X-API-Key": KEY}).json()
        left = {rule["rule"]: rule["remaining"] for rule in usage["rules"]}
        assert left == {None: 950 - servers.index(server), "/api/*": 0, "/deny/*": 50}
        batch = httpx.post(
            f"{server.url}/v1/check/batch", json={"checks": [{"path": "/api/a", "api_key": KEY}, {"path": "/b", "api_key": KEY}]}
        ).json()
        assert [each["allowed"] for each in batch["decisions"]] == [False, True]
    told = servers[0].run("doctor", "--json")
    findings = {each["what"]: each for each in json.loads(told.stdout)}
    assert findings["counters"]["ok"]
    assert "responds" in findings["counters"]["finding"]
    # Each hears of the other with its own next heartbeat.
    wait_until(lambda: "rate_limiter_instances 2.0" in httpx.get(f"{servers[0].url}/metrics").text)
    for server in servers:
        assert server.stop()[0] == 0


def test_it_serves_while_redis_is_unavailable(
    serve: Callable[..., Any], new_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    redis = new_redis()
    server = serve(TIDEGATE_COUNTERS__URL=redis.url, TIDEGATE_BREAKER__OPEN_S="0.5", TIDEGATE_COUNTERS__TIMEOUT_MS="5000")
    assert check(server).json()["degraded"] is False
    assert httpx.get(f"{server.url}/health").status_code == 200
    redis.kill()
    wait_until(lambda: check(server, cost=0).json()["degraded"])
    assert check(server).status_code == 200
    denied = check(server, "/deny/a")
    assert (denied.status_code, denied.json()["error"]["code"]) == (503, "STORE_UNAVAILABLE")
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    assert httpx.get(f"{server.url}/health").json()["components"]["redis"]["status"] != "healthy"
    assert httpx.get(f"{server.url}/readyz").status_code == 200, "an instance that can decide stays in the load balancer"
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'rate_limiter_fallbacks_total{reason="disconnected"}' in metrics
    told = server.run("doctor")
    assert told.returncode == 1
    assert "WRONG counters" in told.stdout
    redis.start()
    wait_until(lambda: not check(server, cost=0).json()["degraded"])
    wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
    # One unit was admitted by the fallback, and is put back.
    wait_until(lambda: check(server, cost=0).json()["remaining"] == 49)
    assert server.stop()[0] == 0


def test_it_starts_without_redis(serve: Callable[..., Any], new_redis: Callable[..., RedisServer], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    redis = new_redis()
    redis.kill()
    server = serve(TIDEGATE_COUNTERS__URL=redis.url, TIDEGATE_BREAKER__OPEN_S="0.5")
    answer = check(server).json()
    assert (answer["allowed"], answer["degraded"]) == (True, True)
    code, _, err = server.stop()
    assert code == 0
    assert "was not added to Redis before shutdown" in err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:hunter2@host:port", "'host:port'"),
        ("redis+sentinel://:hunter2@host", "mymaster"),
        ("rediss://:hunter2@host?ca=/nowhere.pem", "/nowhere.pem"),
        ("mongodb://:hunter2@host", "redis+cluster://"),
    ],
)
def test_wrong_urls_are_one_sentence_and_exit_code_2(serve: Callable[..., Any], url: str, said: str) -> None:
    server = serve(wait=False, TIDEGATE_COUNTERS__URL=url)
    code, _, err = server.stop_by_itself()
    assert code == 2
    assert said in err
    assert "hunter2" not in err
    assert "Traceback" not in err
